#!/usr/bin/env bash
# Train on the GPUs of this machine (on its CPU where there is none).
#
#   bash scripts/launch_single_node.sh [OPTIONS] -- --tokenizer-path PATH [flags of resume_pretrain_tensor.py]
#
#   --nproc-per-node N      processes, one per GPU (default: the GPUs that are visible)
#   --max-restarts N        times that torchrun starts the workers again after a failure (default 0)
#   --shutdown-timeout S    seconds that a save may take after a signal (default 600)
#   --dry-run               print the command and stop
#
# ARGONNE_PYTHON names another interpreter than .venv/bin/python.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
processes="" max_restarts=0 shutdown_timeout=600 dry_run=no
# shellcheck source=scripts/launch_common.sh
. "$root/scripts/launch_common.sh"

while [ "$#" -gt 0 ]; do
    case $1 in
        --nproc-per-node | --nproc_per_node) need_value "$1" "$#" && processes=$2 && shift 2 ;;
        --max-restarts) need_value "$1" "$#" && max_restarts=$2 && shift 2 ;;
        --shutdown-timeout) need_value "$1" "$#" && need_number "$1" "$2" && shutdown_timeout=$2 && shift 2 ;;
        --dry-run) dry_run=yes && shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;;
        --) shift && break ;;
        *) fail "$1 is not a flag of this launcher: flags of the training script come after --" ;;
    esac
done

find_python
choose_processes
check_training_arguments "$@"
set_environment
torchrun_stop_options
run_or_show "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    --max-restarts "$max_restarts" "${stop_options[@]}" "$root/resume_pretrain_tensor.py" "$@"
