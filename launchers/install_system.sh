#!/usr/bin/env bash
# Installs what tests need beside Python packages, on Debian and Ubuntu, as root: SLURM for tests/slurm, which start a
# cluster of their own, and a C++ compiler for the compiled scan. Changes nothing if all is there. Exit status 1, with
# the reason, if it cannot: the tests of SLURM are then skipped, those of the compiled scan fail.
# Usage: install_system.sh
set -euo pipefail

SLURM=(slurmctld slurmd slurm-client)
PATH="$PATH:/usr/sbin:/sbin"

slurm_is_there() {
    local program
    for program in slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" >/dev/null || return 1
    done
}

compiler_is_there() { command -v "${CXX:-c++}" >/dev/null; }

packages=()
slurm_is_there || packages+=("${SLURM[@]}")
compiler_is_there || packages+=(g++ libc6-dev)
((${#packages[@]} > 0)) || exit 0

cannot() {
    printf '%s\n' "not installed: ${packages[*]}: $*" >&2
    exit 1
}

command -v apt-get >/dev/null || cannot "this system has no apt-get; install SLURM and a C++ compiler yourself"
((EUID == 0)) || cannot "that needs root (sudo apt-get install ${packages[*]})"
log="$(mktemp)"
trap 'rm -f -- "$log"' EXIT
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1; }
printf '%s\n' "== installing for the tests: ${packages[*]}"
install || { apt-get update >"$log" 2>&1 && install; } || cannot "apt-get failed: $(tail -n 3 -- "$log")"
slurm_is_there || cannot "they were installed, but not all of SLURM's programs are there"
compiler_is_there || cannot "they were installed, but there is no ${CXX:-c++}"
