#!/usr/bin/env bash
# The whole story in a few minutes: install, make a corpus, train, stop, resume, look at the result; then the
# switches of Argonne 4.0.
#
#   bash scripts/quickstart.sh
#
# Works on what the machine has: two GPUs or more with NCCL, otherwise the CPU with gloo. Everything is written
# under quickstart/; run it again and the corpus is kept and the new run gets a folder of its own.
# ARGONNE_PYTHON names the Python (3.11 or newer) to install with.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${ARGONNE_VENV:-$root/.venv}/bin/python
total_steps=240
stop_step=120
family_steps=60
child=""

heading() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Ctrl-C: let the run save and end, then say what is there.
interrupted() {
    trap '' INT TERM
    printf '\n'
    if [ -n "$child" ] && kill -TERM "$child" 2>/dev/null; then
        printf 'Stopping the run ...\n'
        wait "$child" || true
    fi
    printf 'Interrupted. Nothing is left running; bash scripts/quickstart.sh starts again (remove quickstart/ to clean up).\n'
    exit 130
}
trap interrupted INT TERM

# steps: how many steps the run has recorded.
steps() {
    if [ -f "$run/stats/training_metrics.jsonl" ]; then
        wc -l <"$run/stats/training_metrics.jsonl"
    else
        echo 0
    fi
}

# status KEY: a value of the run's status file.
status() {
    "$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' \
        "$run/stats/run_status.json" "$1"
}

# begin LOG COMMAND...: show a command and start it; its lines are shown, torchrun's own go to the log.
begin() {
    local log=$1
    shift
    printf '$'
    printf ' %q' "${@/#"$python"/python}"
    printf '\n\n'
    "$@" 2>"$log" &
    child=$!
}

# finish: wait for the run; prints nothing, returns its exit code.
finish() {
    local code=0
    wait "$child" || code=$?
    child=""
    return "$code"
}

# explain LOG: why a run failed.
explain() {
    grep -h '^error: ' "$1" >&2 || tail -n 20 "$1" >&2
    fail "the run failed; all it said is in $1"
}

heading "1/7  Install into .venv (minutes the first time)"
bash scripts/install.sh plot
printf 'Installed: %s\n' "$("$python" --version)"
started=$SECONDS

heading "2/7  A corpus and a tokenizer from the Python standard library's own sources and help"
mkdir -p quickstart
corpus=quickstart/corpus
"$python" scripts/quickstart_corpus.py --output-dir "$corpus"

# A folder for this run alone; an earlier run stays as it is.
number=1
until mkdir "quickstart/run_$number" 2>/dev/null; do
    number=$((number + 1))
    [ "$number" -le 10000 ] || fail "quickstart/ cannot be written: free space, or mend its permissions"
done
run=quickstart/run_$number

cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)
export TOKENIZERS_PARALLELISM=true HF_HUB_OFFLINE=1 TORCH_CPP_LOG_LEVEL=ERROR
case $gpus in
    0) where="the CPU ($cores cores, gloo)" ;;
    1)
        where="the CPU ($cores cores, gloo): two processes need two GPUs, and this machine has one"
        export CUDA_VISIBLE_DEVICES=""
        ;;
    *) where="two of the $gpus GPUs (NCCL)" ;;
esac

train=(
    resume_pretrain_tensor.py --model-config argonne-tiny --tokenizer-path "$corpus/tokenizer"
    --data-glob "$corpus/data/*.parquet" --batch-size 16 --block-size 128 --total-steps "$total_steps"
    --learning-rate 4e-3 --min-learning-rate 2e-4 --warmup-steps 20 --log-interval 40 --output-dir "$run"
)

heading "3/7  Train with 2 processes on $where, and stop in the middle"
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
begin "$run/first.log" "$python" -m torch.distributed.run --standalone --nproc_per_node=2 "${train[@]}"
while [ "$(steps)" -lt "$stop_step" ] && kill -0 "$child" 2>/dev/null; do
    sleep 0.1
done
kill -TERM "$child" 2>/dev/null || true
printf '\n-- SIGTERM sent to torchrun, as a scheduler does --\n\n'
finish || true # torchrun ends with 1 after any signal; the status file says what happened
if [ ! -f "$run/stats/run_status.json" ] || [ "$(status state)" != stopped ]; then
    explain "$run/first.log"
fi
stopped_at=$(status step)

heading "4/7  Resume from its checkpoint with 1 process: another degree, the same tokens and the same model"
export OMP_NUM_THREADS=$cores
begin "$run/second.log" "$python" "${train[@]}"
finish || explain "$run/second.log"
checkpoint=$(status checkpoint)

heading "5/7  A sample from the trained model"
"$python" scripts/generate.py --checkpoint-path "$checkpoint" --tokenizer-path "$corpus/tokenizer" \
    --prompt "    def __init__(self" --max-new-tokens 80 --temperature 0.6 --seed 1

heading "6/7  The switches of Argonne 4.0: norms on heads, sandwich norms, soft cap; sequence parallel, wsd"
export OMP_NUM_THREADS=$((cores > 1 ? cores / 2 : 1))
begin "$run/family.log" "$python" -m torch.distributed.run --standalone --nproc_per_node=2 \
    resume_pretrain_tensor.py --model-config argonne-tiny-4 --sequence-parallel --tokenizer-path "$corpus/tokenizer" \
    --data-glob "$corpus/data/*.parquet" --batch-size 16 --block-size 128 --total-steps "$family_steps" \
    --lr-schedule wsd --cooldown-fraction 0.2 --learning-rate 4e-3 --min-learning-rate 2e-4 --warmup-steps 10 \
    --log-interval 20 --output-dir "$run/family"
finish || explain "$run/family.log"
"$python" scripts/generate.py --checkpoint-path "$run/family/pretrained" --tokenizer-path "$corpus/tokenizer" \
    --prompt "    def __init__(self" --max-new-tokens 40 --temperature 0.6 --seed 1

export OMP_NUM_THREADS=$cores
heading "7/7  The curves"
"$python" scripts/plot_training.py "$run" --mark "$stopped_at=stopped with 2 processes, resumed with 1"

cat <<END

Done in $((SECONDS - started)) s after the installation. The files:
$(printf '  %-46s %s\n' \
    "$corpus/data/*.parquet" "the text" \
    "$corpus/tokenizer/" "its tokenizer" \
    "$run/pretrained/*.pth" "checkpoints (at the stop and at the end)" \
    "$run/stats/training_metrics.jsonl" "one line per step" \
    "$run/stats/training.png, .html" "the curves" \
    "$run/family/" "the same of the model with 4.0's switches" \
    "$run/*.log" "what torchrun and the libraries said")

To train for real, on the 8 GPUs of one machine (README.md has the rest):
  .venv/bin/torchrun --standalone --nproc_per_node=8 resume_pretrain_tensor.py \\
      --model-config argonne-2.0 --tokenizer-path TOKENIZER --data-glob 'DATA/*.parquet' --output-dir RUN
END
