"""Signals that ask a run to stop: remembered when they come, acted upon where all ranks agree to (training/decisions).

SLURM and its like warn a job with SIGTERM, SIGUSR1 or SIGUSR2 before they end it; which one differs between clusters.
Only the standard library is imported: the handlers stand before anything slow is.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE = 75  # exit status: "start me again, I go on" (EX_TEMPFAIL of sysexits.h)

_first = 0  # of this process's signals: its number


class Requeue(Exception):  # noqa: N818  # not an error
    """Raised on every rank after a signal to any of them, when all is saved: the process exits with REQUEUE."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped after step {step}")
        self.number, self.step = number, step


def stopped(number: int, first_step: int, step: int, saved_step: int) -> str:
    """What a signal has ended: training from `first_step` to `step`, with a checkpoint of `saved_step`; 0: none."""
    if step > first_step:
        saved = f"the newest checkpoint is of step {saved_step}" if saved_step else "there is no checkpoint"
        what = f"stopped after step {step}, " + ("which is saved" if saved_step == step else saved)
    else:
        what = "stopped before the first step; "
        what += f"nothing was trained since step {step}, which is saved" if step else "this start has trained nothing"
    return f"{signal.Signals(number).name}: {what}; exit status {REQUEUE}: the same command goes on from there"


def received() -> int:
    """Number of the first signal that this process has got within `caught`; 0: none."""
    return _first


def _remember(number: int, _: FrameType | None) -> None:
    global _first
    _first = _first or number


@contextmanager
def caught() -> Iterator[None]:
    """Within, SIGTERM, SIGUSR1 and SIGUSR2 are remembered and do nothing else, however often they come.

    They stay so where the process is going to end by one: launchers repeat theirs. For the main thread.
    """
    global _first
    _first = 0
    before: dict[int, Any] = {number: signal.signal(number, _remember) for number in SIGNALS}
    ending = False
    try:
        yield
    except Requeue:
        ending = True
        raise
    finally:
        if not ending:
            for number, handler in before.items():
                signal.signal(number, handler)
            _first = 0


@contextmanager
def held_back() -> Iterator[None]:
    """Processes started within never see these signals, which a terminal or SLURM sends to a whole group at once.

    A program that was started inherits the mask of blocked signals. Those that come meanwhile reach this process after.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
