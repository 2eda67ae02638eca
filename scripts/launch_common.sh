# shellcheck shell=bash
# Shared by the launchers: checks that fail early with a reason, and the recommended NCCL settings.
# Sourced, not run, after the launcher has set root (this checkout) and its options.
: "${root:?}" "${dry_run:=no}" "${shutdown_timeout:=600}" "${processes:=}"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# need_value FLAG COUNT: FLAG must be followed by a value.
need_value() {
    [ "$2" -ge 2 ] || fail "$1 needs a value"
}

# need_number FLAG VALUE: a whole number above 0.
need_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 $2: give a whole number above 0"
}

# find_python: sets python to the interpreter of .venv, or to the one on the path.
find_python() {
    python=${ARGONNE_PYTHON:-}
    if [ -z "$python" ]; then
        python=$root/.venv/bin/python
        [ -x "$python" ] || python=$(command -v python3 || true)
    fi
    [ -n "$python" ] || fail "no python3 found: run scripts/install.sh, or name one in ARGONNE_PYTHON"
    "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null ||
        fail "$python has no torch (so no torchrun): run scripts/install.sh, or name another one in ARGONNE_PYTHON"
}

# count_gpus: how many GPUs the processes will see (0 where there are none).
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true
    elif command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c '[0-9]' || true
    else
        echo 0
    fi
}

# choose_processes: sets processes (already set where the user did) and checks it against the GPUs.
choose_processes() {
    local gpus
    gpus=$(count_gpus)
    if [ -z "$processes" ]; then
        processes=$gpus
        [ "$processes" -gt 0 ] || processes=1
    fi
    need_number --nproc-per-node "$processes"
    if [ "$gpus" -eq 0 ]; then
        printf 'note: no GPU here, so the %s processes run on the CPU\n' "$processes" >&2
    elif [ "$processes" -gt "$gpus" ]; then
        fail "--nproc-per-node $processes: only $gpus GPUs are visible here; use at most $gpus"
    fi
}

# check_endpoint HOST PORT: the host has an address, and where that is ours, nobody listens on the port yet.
# Sets is_host to true or false: whether the rendezvous store runs here. torchrun looks for the address behind the
# host name alone, and so finds no host when the nodes meet on a second network card.
# shellcheck disable=SC2034 # the launchers read it
check_endpoint() {
    local status=0
    is_host=""
    "$python" - "$1" "$2" <<'PY' || status=$?
import errno, socket, sys
host, port = sys.argv[1], int(sys.argv[2])
try:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
except (OSError, OverflowError):
    sys.exit(3)
# Several agents of one machine may share a loopback endpoint: the first one listens, the others join it.
if address[0].startswith(("127.", "::1")):
    sys.exit(0)
with socket.socket(family) as trial:
    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        trial.bind(address)
    except OSError as error:
        sys.exit({errno.EADDRINUSE: 4, errno.EADDRNOTAVAIL: 6}.get(error.errno, 0))
sys.exit(5)
PY
    case $status in
        0) ;;
        3) fail "--master $1:$2: $1 has no address here; use a name or an address that this host knows" ;;
        4) fail "--master $1:$2: port $2 is in use on this host; stop what listens there or choose another" ;;
        5) is_host=true ;;
        6) is_host=false ;;
        *) fail "--master $1:$2 cannot be checked" ;;
    esac
}

# check_training_arguments ARGUMENT...: what the training script would refuse, before anything starts.
check_training_arguments() {
    [ "$#" -gt 0 ] || fail "no arguments for the training script: give at least --tokenizer-path PATH after --"
    "$python" "$root/scripts/check_flags.py" "$@" || exit $?
}

# set_environment: what must be set before Python starts; what the user has set is kept. The settings of NCCL, CUDA
# and the allocator are the training script's own, the same however it is started (argonne/ranks/gpu_environment.py).
set_environment() {
    # One wrong thread count slows every rank: by default share the cores among the processes.
    local cores
    cores=$(nproc 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}
    export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}
    # Several network cards: NCCL_SOCKET_IFNAME=eth0 (or ^docker0,lo) says which one the ranks meet on.
    if [ -n "${NCCL_SOCKET_IFNAME:-}" ]; then
        export NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NCCL_SOCKET_IFNAME}
    fi
}

# torchrun_stop_options: sets stop_options, so that signals reach the workers and a save has time to end.
torchrun_stop_options() {
    local source
    # Reading torchrun's source takes no time; asking it for --help imports all of torch.
    source=$("$python" -c 'import importlib.util; print(importlib.util.find_spec("torch").origin)')
    source=$(dirname "$source")/distributed/run.py
    [ -f "$source" ] || fail "$python has a torch without torchrun ($source is missing): install it anew"
    stop_options=()
    if grep -q -e '--signals-to-handle' "$source"; then
        stop_options+=(--signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    else
        printf 'note: this torchrun passes no SIGUSR1 on (no --signals-to-handle)\n' >&2
    fi
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$shutdown_timeout
    if grep -q -e '--shutdown-timeout' "$source"; then
        stop_options+=(--shutdown-timeout "$shutdown_timeout")
    else
        printf 'note: this torchrun kills its workers 30 s after a signal (no --shutdown-timeout)\n' >&2
    fi
}

# run_or_show COMMAND...: print the command and its environment, then run it unless --dry-run was given.
run_or_show() {
    local name
    for name in OMP_NUM_THREADS TORCH_ELASTIC_SHUTDOWN_TIMEOUT PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF \
        CUDA_DEVICE_MAX_CONNECTIONS TOKENIZERS_PARALLELISM NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME CUDA_VISIBLE_DEVICES; do
        [ -z "${!name:-}" ] || printf '%s=%q \\\n' "$name" "${!name}"
    done
    printf '%q ' "$@"
    printf '\n'
    [ "$dry_run" = yes ] || exec "$@"
}
