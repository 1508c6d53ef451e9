"""One task of a step, started by srun: its place among the ranks from SLURM's variables, then the command.

Usage: rank.py COMMAND ...    with LOG_DIR, NOTES, RESTART and REQUEUE from lib.sh

"Start me again" becomes status 0 and a note: srun --kill-on-bad-exit would end the ranks that are still saving. The
first task that ends badly leaves its status, its log and what happened in NOTES-bad.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

# SLURM sends a signal to every process of a step: the command hears it as well, and this one must outlive it.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def environment() -> dict[str, str]:
    place = os.environ
    return dict(place) | {
        "RANK": place["SLURM_PROCID"],
        "WORLD_SIZE": place["SLURM_NTASKS"],
        "LOCAL_RANK": place["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": place.get("SLURM_NTASKS_PER_NODE", "1"),
    }


def run(command: list[str]) -> tuple[int, set[int]]:
    """The command's return code, negative for a signal, and the signals that came meanwhile."""
    heard: set[int] = set()
    for each in SIGNALS:
        signal.signal(each, lambda number, _: heard.add(number))
    return subprocess.Popen(command, env=environment()).wait(), heard


def note_bad(code: int) -> int:
    """Unless another task was first. The status, as a shell states it."""
    status = code if code >= 0 else 128 - code
    rank, notes = os.environ["SLURM_PROCID"], os.environ["NOTES"]
    how = f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    log = Path(os.environ["LOG_DIR"], f"r{os.environ['RESTART']}-rank-{rank}.log")
    mine = Path(f"{notes}-bad.{rank}")
    mine.write_text(f"{status} {log}\nrank {rank} on {os.environ.get('SLURMD_NODENAME', 'this node')} {how}\n")
    with suppress(FileExistsError):
        os.link(mine, f"{notes}-bad")  # whole or not at all
    return status


def main(command: list[str]) -> int:
    code, heard = run(command)
    ended_by = -code if code < 0 else code - 128
    if (
        code == int(os.environ["REQUEUE"]) or ended_by in heard
    ):  # ended by a signal before it could mind it: all is kept
        Path(f"{os.environ['NOTES']}-requeue").touch()
        return 0
    return note_bad(code) if code != 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
