#!/usr/bin/env bash
# Everything that needs a GPU, on as many as there are (1, 2 or 8): the tests marked gpu, benchmark.py gpu (one
# GPU: kernels and a rank's share of tp 8) and benchmark.py gpu-runs (all GPUs: real runs, each beside the plan's
# prediction; what must be the defaults; what was left out). About half an hour on one H100, two hours on eight.
#
#   bash scripts/gpu_check.sh [pytest arguments, such as -k resume]
#
# The page stays in benchmarks/gpu_page.md. PYTHON names the interpreter (python). Exit code 1 without a GPU, or
# where a test or a check fails.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=${PYTHON:-python}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no GPU: torch sees none on this machine (nvidia-smi; is this torch built for CUDA?)" >&2
    exit 1
fi
"$python" -c 'import torch
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"GPU {i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")'

status=0
"$python" -m pytest --gpu -m gpu tests/test_gpu.py "$@" || status=$?
"$python" scripts/benchmark.py gpu || status=$?
"$python" scripts/benchmark.py gpu-runs || status=$?
cat benchmarks/gpu-runs.md benchmarks/gpu.md >benchmarks/gpu_page.md || status=$?
! grep -q '^- FAILED' benchmarks/gpu_page.md || status=1
printf 'The page: %s\n' "$root/benchmarks/gpu_page.md"
exit "$status"
