"""What each rank says, besides going through: a file for each start and rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO


def keep_logs(folder: Path, ranks: Mapping[int, subprocess.Popen[bytes]]) -> list[threading.Thread]:
    """Copies the pipes of the ranks, by number, to this process's output and to start-N-rank-R.log in `folder`.

    The threads end with their ranks. OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("start-*-rank-*.log")), default=-1)
    threads = []
    for number, process in ranks.items():
        log = (folder / f"start-{count}-rank-{number}.log").open("ab", buffering=0)
        for source, to in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            threads.append(threading.Thread(target=_copy, args=(source, to.buffer, log), daemon=True))
            threads[-1].start()
    return threads


def _copy(source: BinaryIO, to: BinaryIO, log: BinaryIO) -> None:
    while data := os.read(source.fileno(), 65536):
        log.write(data)
        to.write(data)
        to.flush()
