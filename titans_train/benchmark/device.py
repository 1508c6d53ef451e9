"""Time, peak memory and matmul rate of this process: on a CPU (CPU seconds, resident memory) or a GPU (CUDA events,
its allocator).
"""

from __future__ import annotations

import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from titans_train.errors import UserError

DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check(device: str) -> None:
    """UserError where --device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; use cpu, or start on a machine with one")


def seconds(run: Callable[[], object], device: str, calls: int = 1) -> float:
    """Of one call: of `calls`, with the time of starting them only where the device waits for it."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    started = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - started) / calls


def steady_seconds(run: Callable[[], object], device: str, least: float) -> float:
    """Of one call: of so many that they take about `least` seconds together."""
    first = seconds(run, device)
    return first if first >= least else seconds(run, device, math.ceil(least / max(first, 1e-6)))


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """That one call takes above what is held when it begins."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _trim()
    before = resident_peak()
    run()
    return resident_peak() - before


def _trim() -> None:
    """Gives freed memory back, and lets the peak begin anew, where the system allows it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Bytes, since the process began or `_trim`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large product: 1024^3 on a CPU, 8192^3 on a GPU."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b, device, 3)
    return 2 * n**3 / seconds(lambda: a @ b, device, 20)
