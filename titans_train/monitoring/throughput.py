"""Speed and memory of this process and its device."""

from __future__ import annotations

import resource
import time

import torch


def peak_memory_bytes() -> int:
    """Peak since the process began: of the GPU's allocator, or of resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured_peak_flops(size: int = 1024, repeats: int = 4) -> float:
    """FLOPs per second of a large matmul on this process's device, in its fastest ordinary dtype."""
    cuda = torch.cuda.is_available()
    size, dtype = (8192, torch.bfloat16) if cuda else (size, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device="cuda" if cuda else "cpu")

    def run() -> float:
        started = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run()
    return 2 * size**3 / min(run() for _ in range(repeats))
