# Shared by the launchers; sourced, not run. Sets ROOT and PYTHON_IN_VENV, and defines prepare_environment.
# shellcheck shell=bash

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON_IN_VENV="$VENV/bin/python"
INSTALL_LOG="$VENV/install.log"
NEEDED_GB=6
OLDEST="3, 11"
INDEX_TROUBLE="Connection|timed out|Max retries|Name or service|No matching dist|ResolutionImpossible"
DEFAULT_TORCH="torch==2.13.0"

say() { printf '%s\n' "== $*"; }

fail() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

is_new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < ($OLDEST))" 2>/dev/null; }

# Prints the Python that makes the environment: $PYTHON, or the first new enough one on PATH.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run or is older than 3.11"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_new_enough "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no python3 of version 3.11 or newer on PATH; install one, or name one with PYTHON=/path/to/python3.12"
}

require_space() {
    local free_kb
    free_kb="$(df -Pk -- "$ROOT" | awk 'NR == 2 { print $4 }')"
    if ((free_kb < NEEDED_GB * 1024 * 1024)); then
        fail "only $((free_kb / 1024 / 1024)) GB are free where $ROOT lies; the installation needs $NEEDED_GB GB"
    fi
}

# Prints the release of the torch that a Python sees, without a local suffix such as +cpu; nothing if it sees none.
torch_release() {
    "$1" -c '
import importlib.metadata as metadata
try:
    print(metadata.version("torch").split("+")[0])
except metadata.PackageNotFoundError:
    pass'
}

fits_range() { [[ "$1" =~ ^2\.1[123]([^0-9]|$) ]]; }

make_venv() {
    local python options=()
    if [[ -x "$PYTHON_IN_VENV" ]] && "$PYTHON_IN_VENV" -m pip --version >/dev/null 2>&1; then
        is_new_enough "$PYTHON_IN_VENV" || fail "$VENV has a Python older than 3.11; remove that folder and start again"
        return
    fi
    python="$(find_python)"
    "$python" -c "import ensurepip, venv" 2>/dev/null ||
        fail "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
    # A torch that came with the machine, often built for its GPUs, is shared rather than installed a second time.
    if fits_range "$(torch_release "$python")"; then
        options+=(--system-site-packages)
    fi
    say "making $VENV with $("$python" --version)"
    "$python" -m venv ${options[@]+"${options[@]}"} "$VENV" || fail "$python -m venv could not make $VENV (see above)"
}

# What an installation depends on: the requirements, and where the editable package lies.
fingerprint() {
    { cat -- "$ROOT/pyproject.toml" "$ROOT/launchers/constraints.txt" && printf '%s' "$ROOT"; } | "$PYTHON_IN_VENV" -c \
        'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

explain_pip_failure() {
    tail -n 15 -- "$INSTALL_LOG" >&2
    if grep -q "No space left" "$INSTALL_LOG"; then
        fail "the disk is full; free some space and start again (full log: $INSTALL_LOG)"
    elif grep -qE "$INDEX_TROUBLE" "$INSTALL_LOG"; then
        fail "pip could not reach its package index, or that lacks a release which launchers/constraints.txt pins;" \
            "check the network and 'pip config list' (full log: $INSTALL_LOG)"
    fi
    fail "pip could not install the packages (full log: $INSTALL_LOG)"
}

# prepare_environment [test]: makes .venv and installs the package, editable, with that extra; skips what is done.
prepare_environment() {
    local extra="${1:-}" stamp print release requirement
    stamp="$VENV/installed-${extra:-base}"
    [[ -x "$PYTHON_IN_VENV" ]] || require_space
    make_venv
    print="$(fingerprint)"
    if [[ -f "$stamp" && "$(<"$stamp")" == "$print" ]]; then
        return
    fi
    require_space
    release="$(torch_release "$PYTHON_IN_VENV")"
    requirement="${release:+torch==$release}"
    if [[ -z "$requirement" ]]; then
        requirement="${TITANS_TORCH:-$DEFAULT_TORCH}"
    elif ! fits_range "$release"; then
        fail "$VENV has torch $release; this project runs on 2.11 to 2.13: remove that folder and start again"
    fi
    say "installing into $VENV with $requirement (some minutes the first time; log: $INSTALL_LOG)"
    "$PYTHON_IN_VENV" -m pip install --progress-bar off -c "$ROOT/launchers/constraints.txt" "$requirement" \
        -e "$ROOT${extra:+[$extra]}" >"$INSTALL_LOG" 2>&1 || explain_pip_failure
    printf '%s\n' "$print" >"$VENV/installed-base" # an extra includes the package itself
    printf '%s\n' "$print" >"$stamp"
}
