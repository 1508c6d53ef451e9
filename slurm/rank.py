"""One task of a step, started by srun: its place among the ranks from SLURM's variables, then the command.

Usage: rank.py COMMAND ...    with LOG_DIR, NOTES, RESTART and REQUEUE from lib.sh

The command writes into LOG_DIR/rRESTART-rank-RANK.log; with LOGGED=no, where srun does. NOTES-done-RANK proves that it
ran to a good end. "Start me again" becomes status 0 and one more note: srun --kill-on-bad-exit would end the ranks that
are still saving. The first task that ends badly leaves its status, its log and what happened in NOTES-bad. So does one
whose signal came before it could mind it, with the status "start me again": the others would wait in vain.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
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


def log_path() -> Path | None:
    """None: the command writes where srun does. No pattern of srun's --output, which reads % and \\ in folders."""
    if os.environ.get("LOGGED") == "no":
        return None
    return Path(os.environ["LOG_DIR"], f"r{os.environ['RESTART']}-rank-{os.environ['SLURM_PROCID']}.log")


def run(command: list[str]) -> tuple[int, bool]:
    """The command's return code, negative for a signal, and whether a signal that came to this process too ended it.

    A shell whose own command the signal ended first may say 128 + signal: that is the signal's as well.
    """
    heard: set[int] = set()
    for each in SIGNALS:
        signal.signal(each, lambda number, _: heard.add(number))
    path = log_path()
    with nullcontext() if path is None else path.open("ab") as log:
        code = subprocess.Popen(command, env=environment(), stdout=log, stderr=log).wait()
    ended_by = -code if code < 0 else code - 128
    deadline = time.monotonic() + 1  # SLURM sends it to one process after the other
    while ended_by in SIGNALS and ended_by not in heard and time.monotonic() < deadline:
        time.sleep(0.02)
    return (-ended_by, True) if ended_by in heard else (code, False)


def note_bad(code: int, status: int) -> int:
    """Unless another task was first. The status."""
    rank, notes = os.environ["SLURM_PROCID"], os.environ["NOTES"]
    how = f"ended with status {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
    mine = Path(f"{notes}-bad.{rank}")
    where = os.environ.get("SLURMD_NODENAME", "this node")
    mine.write_bytes(os.fsencode(f"{status} {log_path() or ''}\nrank {rank} on {where} {how}\n"))
    with suppress(FileExistsError):
        os.link(mine, f"{notes}-bad")  # whole or not at all
    return status


def main(command: list[str]) -> int:
    code, unheard = run(command)
    notes = os.environ["NOTES"]
    requeue = int(os.environ["REQUEUE"])
    if unheard:
        return note_bad(code, requeue)
    if code == requeue:
        Path(f"{notes}-requeue").touch()
    elif code != 0:
        return note_bad(code, code if code >= 0 else 128 - code)
    Path(f"{notes}-done-{os.environ['SLURM_PROCID']}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
