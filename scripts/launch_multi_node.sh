#!/usr/bin/env bash
# Train on several machines: run the same command on every one of them; torchrun numbers the nodes itself.
#
#   bash scripts/launch_multi_node.sh --nnodes N --master HOST:PORT [OPTIONS] -- --tokenizer-path PATH [flags ...]
#
#   --nnodes N              machines
#   --master HOST:PORT      where the nodes meet: a machine among them that all others reach, and a free port there
#   --local-addr ADDR       address of this machine, where its own host name does not lead others to it
#   --run-id NAME           the same on all nodes (default: argonne)
#   --nproc-per-node N      processes per machine, one per GPU (default: the GPUs that are visible)
#   --max-restarts N        times that torchrun starts the workers again after a failure (default 0)
#   --shutdown-timeout S    seconds that a save may take after a signal (default 600)
#   --join-timeout S        seconds to wait for the other nodes (default 900)
#   --dry-run               print the command and stop
#
# Tensor parallelism stays inside a node, data parallelism goes across. Only the node of rank 0 needs data,
# tokenizer and output folder: the one whose host name (or --local-addr) sorts first.
# ARGONNE_PYTHON names another interpreter than .venv/bin/python.
# NCCL_SOCKET_IFNAME names the network card to meet on where there are several.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
processes="" nodes="" master="" local_addr="" run_id=argonne
max_restarts=0 shutdown_timeout=600 join_timeout=900 dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

while [ "$#" -gt 0 ]; do
    case $1 in
        --nnodes) need_value "$1" "$#" && need_number "$1" "$2" && nodes=$2 && shift 2 ;;
        --master) need_value "$1" "$#" && master=$2 && shift 2 ;;
        --local-addr) need_value "$1" "$#" && local_addr=$2 && shift 2 ;;
        --run-id) need_value "$1" "$#" && run_id=$2 && shift 2 ;;
        --nproc-per-node | --nproc_per_node) need_value "$1" "$#" && processes=$2 && shift 2 ;;
        --max-restarts) need_value "$1" "$#" && max_restarts=$2 && shift 2 ;;
        --shutdown-timeout) need_value "$1" "$#" && need_number "$1" "$2" && shutdown_timeout=$2 && shift 2 ;;
        --join-timeout) need_value "$1" "$#" && need_number "$1" "$2" && join_timeout=$2 && shift 2 ;;
        --dry-run) dry_run=yes && shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        *) fail "$1 is not a flag of this launcher: flags of the training script come after --" ;;
    esac
done

[ -n "$nodes" ] || fail "--nnodes is missing: how many machines take part?"
[ -n "$master" ] || fail "--master is missing: give HOST:PORT of a machine that all others reach"
[[ $master =~ ^[^[:space:]:]+:[0-9]+$ ]] || fail "--master $master: give it as HOST:PORT"

find_python
choose_processes
check_training_arguments "$@"
check_endpoint "${master%:*}" "${master#*:}"
set_environment
torchrun_stop_options
address=()
[ -z "$local_addr" ] || address=(--local-addr "$local_addr")
run_or_show "$python" "$root/scripts/launch_torchrun.py" --nnodes "$nodes" --nproc-per-node "$processes" \
    --rdzv-backend c10d --rdzv-endpoint "$master" --rdzv-id "$run_id" "${address[@]}" \
    --rdzv-conf "join_timeout=$join_timeout${is_host:+,is_host=$is_host}" --max-restarts "$max_restarts" "${stop_options[@]}" \
    "$root/resume_pretrain_tensor.py" "$@"
