#!/usr/bin/env bash
# Installs SLURM for tests/slurm, which start a cluster of their own: on Debian and Ubuntu, as root. Changes nothing if
# it is there. Exit status 1, with the reason, if it cannot: those tests are then skipped.
# Usage: install_slurm.sh
set -euo pipefail

PACKAGES=(slurmctld slurmd slurm-client)
PATH="$PATH:/usr/sbin:/sbin"

cannot() {
    printf '%s\n' "SLURM is not installed: $*; tests/slurm are skipped" >&2
    exit 1
}

is_there() {
    local program
    for program in slurmctld slurmd sbatch srun scontrol; do
        command -v "$program" >/dev/null || return 1
    done
}

is_there && exit 0
command -v apt-get >/dev/null || cannot "this system has no apt-get; install slurmctld, slurmd and srun yourself"
((EUID == 0)) || cannot "that needs root (sudo apt-get install ${PACKAGES[*]})"
log="$(mktemp)"
trap 'rm -f -- "$log"' EXIT
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${PACKAGES[@]}" >"$log" 2>&1; }
printf '%s\n' "== installing SLURM for its tests: ${PACKAGES[*]}"
install || { apt-get update >"$log" 2>&1 && install; } || cannot "apt-get failed: $(tail -n 3 -- "$log")"
is_there || cannot "${PACKAGES[*]} were installed, but not all of their programs are there"
