#!/usr/bin/env bash
# Two nodes on one machine: two torchrun agents that meet by rendezvous, as on two machines; train, stop, resume.
#
#   bash scripts/two_nodes_on_one_machine.sh [OPTIONS] [-- flags of the training script ...]
#
#   --network MODE       namespaces: two network namespaces joined by a cable (needs root and ip);
#                        loopback: both agents on 127.0.0.1; default: namespaces where the rights are there
#   --work-dir DIR       where corpus and nodes lie (default: quickstart)
#   --nproc-per-node N   processes per node (default 2)
#   --stop-step N        steps before the stop in the middle (default 20)
#
# Each node has a folder of its own. The first holds corpus, tokenizer and, later, the run; the second holds nothing
# and needs nothing. Tensor parallelism stays inside a node, data parallelism crosses the cable.
# On two real machines, run scripts/launch_multi_node.sh on each instead.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
network="" work_dir=$root/quickstart processes=2 port=29400 stop_step=20
left=argonne_left_$$ right=argonne_right_$$
agents=() codes=()

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

while [ "$#" -gt 0 ]; do
    case $1 in
        --network | --work-dir | --nproc-per-node | --stop-step) [ "$#" -ge 2 ] || fail "$1 needs a value" ;;&
        --network) network=$2 && shift 2 ;;
        --work-dir) work_dir=$2 && shift 2 ;;
        --nproc-per-node) processes=$2 && shift 2 ;;
        --stop-step) stop_step=$2 && shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        *) fail "$1 is not an option of this script: flags of the training script come after --" ;;
    esac
done

# make_cable: two namespaces, an address in each, and a virtual cable between them.
make_cable() {
    # Of both names the first 15 characters count, so the process number comes early.
    local end_a=arg$$a end_b=arg$$b
    ip netns add "$left" && ip netns add "$right" &&
        ip link add "$end_a" netns "$left" type veth peer name "$end_b" netns "$right" &&
        ip -n "$left" link set "$end_a" name cable up && ip -n "$right" link set "$end_b" name cable up &&
        ip -n "$left" addr add 10.77.0.1/24 dev cable && ip -n "$right" addr add 10.77.0.2/24 dev cable &&
        ip -n "$left" link set lo up && ip -n "$right" link set lo up
}

remove_cable() {
    ip netns del "$left" 2>/dev/null || true # the cable goes with its ends
    ip netns del "$right" 2>/dev/null || true
}

clean_up() {
    trap '' INT TERM
    local agent
    for agent in "${agents[@]}"; do
        kill -TERM "$agent" 2>/dev/null || true
    done
    wait || true
    remove_cable
}

case $network in
    "" | namespaces)
        if command -v ip >/dev/null 2>&1 && make_cable 2>/dev/null; then
            network=namespaces
        else
            remove_cable
            [ -z "$network" ] || fail "--network namespaces: needs root and the ip command (iproute2); try loopback"
            network=loopback
        fi
        ;;
    loopback) ;;
    *) fail "--network $network: namespaces or loopback" ;;
esac
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

if [ -z "${ARGONNE_PYTHON:-}" ]; then
    bash "$root/scripts/install.sh"
    export ARGONNE_PYTHON=${ARGONNE_VENV:-$root/.venv}/bin/python
fi
mkdir -p "$work_dir"
work_dir=$(cd -- "$work_dir" && pwd)
"$ARGONNE_PYTHON" "$root/scripts/quickstart_corpus.py" --output-dir "$work_dir/corpus"

# A folder for this run alone; earlier ones stay as they are.
number=1
until mkdir "$work_dir/two_nodes_$number" 2>/dev/null; do
    number=$((number + 1))
    [ "$number" -le 10000 ] || fail "--work-dir $work_dir cannot be written"
done
nodes=$work_dir/two_nodes_$number
mkdir "$nodes/first" "$nodes/second"
ln -s "$work_dir/corpus" "$nodes/first/corpus"

# Paths below are relative to a node's own folder: the second finds nothing there.
flags=(
    --model-config argonne-tiny --tokenizer-path corpus/tokenizer --data-glob 'corpus/data/*.parquet'
    --batch-size 8 --block-size 128 --total-steps 60 --learning-rate 4e-3 --min-learning-rate 2e-4
    --warmup-steps 10 --log-interval 20 --output-dir run "$@"
)
# Both nodes share this machine's cores, and its GPUs cannot serve two nodes.
export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# start_node NAME ADDRESS [PREFIX ...]: an agent with its workers, in the node's folder, in the background.
start_node() {
    local name=$1 address=$2
    shift 2
    (
        cd "$nodes/$name"
        exec "$@" bash "$root/scripts/launch_multi_node.sh" --nnodes 2 --master "$master:$port" \
            --local-addr "$address" --nproc-per-node "$processes" --join-timeout 120 -- "${flags[@]}"
    ) >>"$nodes/$name.log" 2>&1 &
    agents+=("$!")
}

start_nodes() {
    if [ "$network" = namespaces ]; then
        start_node first 10.77.0.1 ip netns exec "$left"
        start_node second 10.77.0.2 ip netns exec "$right"
    else
        # Of agents with the same address the one that started first becomes the first node.
        port=$("$ARGONNE_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
        start_node first 127.0.0.1
        start_node second 127.0.0.1
    fi
}

# wait_for_nodes: sets codes to the agents' exit codes.
wait_for_nodes() {
    local agent code
    codes=()
    for agent in "${agents[@]}"; do
        code=0
        wait "$agent" || code=$?
        codes+=("$code")
    done
    agents=()
}

# explain: the end of what the nodes said.
explain() {
    tail -n 20 "$nodes/first.log" "$nodes/second.log" >&2
    fail "$1; all they said is in $nodes"
}

# steps: how many steps the run has recorded.
steps() {
    local record=$nodes/first/run/stats/training_metrics.jsonl
    if [ -f "$record" ]; then wc -l <"$record"; else echo 0; fi
}

if [ "$network" = namespaces ]; then
    printf 'Two network namespaces: 10.77.0.1 and 10.77.0.2, a cable between them\n'
    master=10.77.0.1
    export GLOO_SOCKET_IFNAME=cable NCCL_SOCKET_IFNAME=cable
else
    printf 'Both nodes on 127.0.0.1\n'
    master=127.0.0.1
fi
printf 'Logs: %s %s\n\n' "$nodes/first.log" "$nodes/second.log"

start_nodes
while [ "$(steps)" -lt "$stop_step" ] && kill -0 "${agents[@]}" 2>/dev/null; do
    sleep 0.1
done
printf -- '-- after %s steps: SIGTERM to the agent of the second node; both save and stop --\n' "$(steps)"
kill -TERM "${agents[1]}" 2>/dev/null || true
wait_for_nodes # torchrun ends with 1 after any signal; the status file says what happened
grep -q '"state": "stopped"' "$nodes/first/run/stats/run_status.json" 2>/dev/null ||
    explain "the nodes did not stop after a save"
printf -- '-- the same command on both nodes: they go on --\n'
start_nodes
wait_for_nodes
[ "${codes[*]}" = "0 0" ] || explain "the nodes ended with ${codes[*]}"

grep -hE '^(Layout|Batch|Start|Saved|Stopped|Finished|Step )' "$nodes/first.log"
printf '\nThe first node has: %s\n' "$(cd "$nodes/first" && find run -name '*.pth' | sort -V | tr '\n' ' ')"
printf 'The second node has: %s\n' "$(find "$nodes/second" -mindepth 1 | tr '\n' ' ' | grep . || echo nothing)"
