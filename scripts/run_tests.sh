#!/usr/bin/env bash
# Everything a change must pass: ruff (lint and format), mypy, pytest. Installs into .venv on the first run.
#
#   bash scripts/run_tests.sh [pytest arguments, such as -k loss or --slow]
#   bash scripts/run_tests.sh --oldest|--newest [pytest arguments]
#
# --oldest and --newest run the tests that touch the libraries (marked so) with the lowest versions that
# pyproject.toml allows, or the newest ones, in .venv-oldest and .venv-newest, which they make.
# TEST_PROCESSES sets how many tests run at once (2).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

run_pytest() {
    local status=0
    "$bin/python" -m pytest -n "${TEST_PROCESSES:-2}" "$@" || status=$?
    if [ "$status" -eq 5 ]; then
        printf 'error: pytest collected no test: check the arguments %s\n' "$*" >&2
    fi
    exit "$status"
}

case ${1:-} in
--oldest | --newest)
    versions=${1#--}
    shift
    export ARGONNE_VENV=$root/.venv-$versions ARGONNE_VERSIONS=$versions
    bash scripts/install.sh test,plot
    bin=$ARGONNE_VENV/bin
    "$bin/python" -m pip --disable-pip-version-check list | grep -iE \
        '^(accelerate|datasets|huggingface.hub|matplotlib|numpy|pyarrow|pytest|safetensors|tokenizers|torch|tqdm|transformers) '
    run_pytest -m libraries "$@"
    ;;
esac

bash scripts/install.sh test,plot
bin=${ARGONNE_VENV:-$root/.venv}/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
run_pytest "$@"
