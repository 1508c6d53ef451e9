"""A rank for tests of launchers/ranks.py: says its environment, then does what its line of arguments says.

Usage: rank_worker.py FOLDER ACTION ...    one action per rank:
exit N | signal N (sends it to itself) | wait (ends with 75 on a signal that launchers relay) | deaf (to the signals)
| default (has no handlers) | misses N (ends with N soon after a signal) | child (as deaf, with a child of its own)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
RELAYED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def heard(folder: Path, rank: str, number: int) -> None:
    (folder / f"heard-{rank}").write_text(signal.Signals(number).name)
    os._exit(75)


def main(folder: Path, actions: list[str]) -> None:
    rank = os.environ["RANK"]
    action, _, number = actions[int(rank)].partition(" ")
    sys.stdout.write(f"rank {rank} says {action}\n")
    sys.stderr.write(f"rank {rank} errs\n")
    handlers = {
        "default": signal.SIG_DFL,
        "wait": lambda n, _: heard(folder, rank, n),
        "misses": lambda n, _: (time.sleep(0.3), os._exit(int(number))),
    }
    for each in RELAYED:
        signal.signal(each, handlers.get(action, signal.SIG_IGN))
    facts: dict[str, object] = {name: os.environ.get(name) for name in NAMES}
    facts |= {"pid": os.getpid(), "torchelastic": [name for name in os.environ if name.startswith("TORCHELASTIC")]}
    if action == "child":
        facts["child"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"]).pid
    temporary = folder / f"rank-{rank}.tmp"
    temporary.write_text(json.dumps(facts))
    temporary.rename(folder / f"rank-{rank}")  # there: this rank is ready
    if action == "exit":
        sys.exit(int(number))
    if action == "signal":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), int(number))
    time.sleep(120)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
