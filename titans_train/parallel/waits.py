"""How long this rank has been blocked by the others: what is left of its time is its own.

In a coupled model every rank's step takes as long as the slowest one's, so only this tells who is slow. Every blocking
exchange of torch.distributed, DeepSpeed and megatron-core over gloo ends in `Work.wait`, which is timed here.

Over NCCL `Work.wait` returns at once, and a rank waits for the others on its device. There what is called a rank's own
time is all of its time, and only its wait for data tells it from the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Blocked:
    """seconds: spent in waiting since the beginning."""

    def __init__(self) -> None:
        self.seconds = 0.0


@contextmanager
def timed_waits() -> Iterator[Blocked]:
    """Within, the waits of this process are added up."""
    blocked, wait = Blocked(), dist.Work.wait

    def timed(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return wait(work, *args, **kwargs)
        finally:
            blocked.seconds += time.perf_counter() - started

    dist.Work.wait = timed  # type: ignore[assignment, method-assign]
    try:
        yield blocked
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
