# Shared by the launchers; sourced, not run. Sets ROOT and PYTHON_IN_VENV, and defines prepare_environment; the second
# part is for the launchers of your own runs.
# TITANS_PYTHON=/path/to/python: use this interpreter as it is, such as a cluster's; make no .venv, install nothing.
# shellcheck shell=bash

ROOT="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON_IN_VENV="${TITANS_PYTHON:-$VENV/bin/python}"
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

# A foreign Python needs no package of this project installed: its folder is put on the path of all that starts here.
accept_python() {
    is_new_enough "$TITANS_PYTHON" || fail "TITANS_PYTHON=$TITANS_PYTHON does not run or is older than 3.11"
    fits_range "$(torch_release "$TITANS_PYTHON")" ||
        fail "TITANS_PYTHON=$TITANS_PYTHON has no torch of 2.11 to 2.13; install one there, or unset TITANS_PYTHON"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

# prepare_environment [test]: makes .venv and installs the package, editable, with that extra; skips what is done.
prepare_environment() {
    local extra="${1:-}" stamp print release requirement
    if [[ -n "${TITANS_PYTHON:-}" ]]; then
        accept_python
        return
    fi
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

# --- What train.sh and train_nodes.sh share ---

# The comment at the head of the running script.
show_usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' -- "$0"; }

refuse() {
    printf '%s\n\n' "error: $*" >&2
    show_usage >&2
    exit 2
}

# read_arguments "--option ..." "$@": sets config and overrides, for --cpu cpu=yes, and for a named option the variable
# of its name: --node-rank 1 sets node_rank=1.
read_arguments() {
    local known=" $1 " name
    config="" overrides=() cpu=""
    shift
    while (($# > 0)); do
        case "$1" in
            -h | --help)
                show_usage
                exit 0
                ;;
            --cpu) cpu=yes ;;
            -*)
                [[ "$known" == *" $1 "* ]] || refuse "there is no option '$1'"
                [[ -n "${2:-}" && "$2" != --* ]] || refuse "$1 needs a value"
                name="${1#--}"
                printf -v "${name//-/_}" '%s' "$2"
                shift
                ;;
            [a-z]*.*=*) overrides+=("$1") ;;
            *)
                [[ -z "$config" ]] || refuse "'$1' is no setting; write key.path=value, such as training.steps=100"
                config="$1"
                ;;
        esac
        shift
    done
    [[ -n "$config" ]] || refuse "name a config, such as configs/quickstart.yaml"
    [[ -f "$config" ]] || fail "there is no config $config"
}

# require_number OPTION VALUE LEAST
require_number() {
    [[ "$2" =~ ^(0|[1-9][0-9]{0,5})$ && "$2" -ge "$3" ]] || refuse "$1 '$2' is not a number from $3 up"
}

# Sets processes (on this host): as asked, or one per visible GPU; more than there are GPUs is an error, and so is a
# run on the CPU that nobody asked for.
choose_processes() {
    local gpus
    if [[ -n "$processes" ]]; then
        require_number --processes "$processes" 1
    fi
    if [[ -n "$cpu" ]]; then
        [[ -n "$processes" ]] || refuse "--cpu needs --processes N"
        return
    fi
    gpus="$("$PYTHON_IN_VENV" -c 'import torch; print(torch.cuda.device_count())')"
    ((gpus > 0)) || fail "torch sees no GPU on this host (CUDA_VISIBLE_DEVICES: ${CUDA_VISIBLE_DEVICES-not set});" \
        "to train on the CPU, say --cpu --processes N"
    processes="${processes:-$gpus}"
    ((processes <= gpus)) ||
        fail "--processes $processes is more than the $gpus GPUs that torch sees; each process needs its own"
}

# What every process of a run inherits. Your own values stay, but for what --cpu means.
set_run_environment() {
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}" # Megatron's tensor parallelism asks for it
    export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
    if [[ -n "$cpu" ]]; then
        export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu
    fi
}

# set_interface NAME: the network interface that NCCL and gloo talk over.
set_interface() {
    [[ ! -d /sys/class/net || -e "/sys/class/net/$1" ]] ||
        fail "this host has no network interface '$1'; it has: $(cd /sys/class/net && echo *)"
    export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-=$1}" # "=": this name, not all that begin with it
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$1}"
}
