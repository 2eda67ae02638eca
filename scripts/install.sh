#!/usr/bin/env bash
# Install the suite, editable, into .venv of this checkout; nothing to do when that has been done.
#
#   bash scripts/install.sh [EXTRAS]      EXTRAS: test, plot or test,plot (see pyproject.toml)
#
# ARGONNE_PYTHON names the interpreter (3.11 or newer), ARGONNE_VENV another folder than .venv. ARGONNE_VERSIONS
# is pinned (constraints.txt, the default), oldest or newest (by the ranges in pyproject.toml).
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${ARGONNE_VENV:-$root/.venv}
extras=${1:-}
versions=${ARGONNE_VERSIONS:-pinned}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${ARGONNE_PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer among ${ARGONNE_PYTHON:-python3, python3.11 to python3.13}:" \
        "install one, or name it in ARGONNE_PYTHON"
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    printf 'Making %s with %s\n' "$venv" "$python"
    "$python" -m venv "$venv" ||
        fail "$python cannot make a virtual environment: install its venv module (Debian: python3-venv)"
fi

# A changed requirement, another extra, a moved checkout or another interpreter asks for an installation.
stamp=$venv/.installed-${extras//,/-}
wanted=$(
    {
        cat "$root/pyproject.toml" "$root/constraints.txt"
        printf '%s\n' "$root" "$versions"
        "$venv/bin/python" --version
    } | "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi

pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)
constraints=$root/constraints.txt
if [ "$versions" != pinned ]; then
    constraints=$venv/constraints.txt
    # Lower bounds exactly, or the ranges alone, of everything that pyproject.toml names.
    "$venv/bin/python" - "$root/pyproject.toml" "$versions" >"$constraints" <<'PYTHON'
import re
import sys
import tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = [name for group in project["optional-dependencies"].values() for name in group]
for requirement in project["dependencies"] + extras:
    requirement = re.sub(r"\[.*?\]", "", requirement)  # pip takes no extras in a constraint
    lowest = requirement.split(",")[0].replace(">=", "==")
    print(lowest if sys.argv[2] == "oldest" else requirement)
PYTHON
fi
# torch by itself first: a build for this machine (CPU or CUDA) that pip is set up to prefer is taken as it is.
if [ "$versions" = newest ]; then
    "${pip[@]}" --upgrade --upgrade-strategy eager --constraint "$constraints" torch
    "${pip[@]}" --upgrade --upgrade-strategy eager --constraint "$constraints" --editable "$root${extras:+[$extras]}"
else
    "${pip[@]}" "$(grep '^torch==' "$constraints")"
    "${pip[@]}" --constraint "$constraints" --editable "$root${extras:+[$extras]}"
fi
printf '%s\n' "$wanted" >"$stamp"
