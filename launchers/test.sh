#!/usr/bin/env bash
# Installs with the extra "test", SLURM and a C++ compiler where it can (install_system.sh); then runs ruff, mypy and
# pytest. All three run, each failure counts, and the last lines name them.
# Usage: test.sh [--all] [pytest arguments]    --all: the long tests too
# Without pytest arguments the tests that mostly wait, for SLURM and for killed runs, run beside the others.
set -euo pipefail
# shellcheck source=launchers/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

cd -- "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
prepare_environment test
bash launchers/install_system.sh || true # says why not; the tests that need it are then skipped

WAITING=(tests/slurm tests/fault_table)
status=0 waiting="" logs="$(mktemp -d)"
trap '[[ -z "$waiting" ]] || kill "$waiting"; rm -rf -- "$logs"' EXIT
say "ruff"
"$PYTHON_IN_VENV" -m ruff check . || status=1
say "mypy"
"$PYTHON_IN_VENV" -m mypy || status=1
say "pytest$([[ $status == 0 ]] || printf ' (ruff or mypy failed above, so this run fails)')"
if (($# > 0)) && [[ "$*" != --all ]]; then
    "$PYTHON_IN_VENV" -m pytest "$@" || status=$?
    exit "$status"
fi
"$PYTHON_IN_VENV" -m pytest -rfEs "$@" "${WAITING[@]}" >"$logs/waiting" 2>&1 &
waiting=$!
"$PYTHON_IN_VENV" -m pytest -rfEs "$@" "${WAITING[@]/#/--ignore=}" | tee -- "$logs/others" || status=$?
say "pytest ${WAITING[*]}"
wait "$waiting" || status=$?
waiting=""
cat -- "$logs/waiting"
say "the others, once more$([[ $status == 0 ]] || printf ' (something failed: ruff, mypy, above or below)')"
sed -n '/short test summary/,$p' -- "$logs/others"
exit "$status"
