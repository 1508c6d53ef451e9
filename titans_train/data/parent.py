"""Processes that end with the one that started them, however it ends; and what a process is doing."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IMPORTER = os.getpid()


def end_with_parent() -> None:
    """From now on the kernel kills this process when the thread that started it has ended. Does nothing but on Linux.

    A parent that has ended before is noticed where this module was imported there, and this process forked from it; not
    noticed, a reader would stay for ever.
    """
    if sys.platform == "linux":
        parent = os.getppid() if os.getpid() == _IMPORTER else _IMPORTER
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


def state_of(pid: int | None) -> str:
    """The kernel's letter for what a process is doing, as in ps; "" where it has ended, or the system is not Linux."""
    try:
        return chr(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0][0])
    except OSError:
        return ""
