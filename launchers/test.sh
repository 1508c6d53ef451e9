#!/usr/bin/env bash
# Installs with the extra "test", SLURM and a C++ compiler where it can (install_system.sh); then runs ruff, mypy and
# pytest. All three run, each failure counts, and the last lines name them.
# Usage: test.sh [--all] [pytest arguments]    --all: the long tests too
# Without pytest arguments they run in three streams beside each other: what mostly waits, for SLURM and for killed
# runs; what needs one process; and the others.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

cd -- "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
prepare_environment test
bash launchers/install_system.sh || true # says why not; the tests that need it are then skipped

STREAMS=(
    "tests/slurm tests/fault_table"
    "tests/benchmark tests/data tests/data_prep tests/evaluation tests/inference tests/memory tests/models"
)
status=0 running=() logs="$(mktemp -d)"
trap '((${#running[@]} == 0)) || kill "${running[@]}" || true; rm -rf -- "$logs"' EXIT
say "ruff"
"$PYTHON_IN_VENV" -m ruff check . || status=1
say "mypy"
"$PYTHON_IN_VENV" -m mypy || status=1
say "pytest$([[ $status == 0 ]] || printf ' (ruff or mypy failed above, so this run fails)')"
if (($# > 0)) && [[ "$*" != --all ]]; then
    "$PYTHON_IN_VENV" -m pytest "$@" || status=$?
    exit "$status"
fi
ignored=()
for stream in "${!STREAMS[@]}"; do
    read -ra folders <<<"${STREAMS[$stream]}"
    "$PYTHON_IN_VENV" -m pytest -rfEs "$@" "${folders[@]}" >"$logs/$stream" 2>&1 &
    running+=($!)
    ignored+=("${folders[@]/#/--ignore=}")
done
"$PYTHON_IN_VENV" -m pytest -rfEs "$@" "${ignored[@]}" | tee -- "$logs/others" || status=$?
for stream in "${!STREAMS[@]}"; do
    say "pytest ${STREAMS[$stream]}"
    wait "${running[0]}" || status=$?
    running=("${running[@]:1}")
    cat -- "$logs/$stream"
done
say "all, once more$([[ $status == 0 ]] || printf ' (something failed: ruff, mypy, below)')"
for log in "$logs"/*; do
    sed -n '/short test summary/,$p' -- "$log"
done
exit "$status"
