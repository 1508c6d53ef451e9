"""What a process asks of its processor and its C library, for speed; results do not change."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import numpy as np
import torch

SETTINGS = ("MALLOC_", "GLIBC_TUNABLES")  # the environment's own, for the same: mallopt(3)
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
SIZES = (1 << 30, 32 << 20)  # up to which freed memory is kept; some versions of glibc take no more than the second


def flush_denormals() -> None:
    """A CPU is several times slower at numbers near zero, which a memory's are where it has all but forgotten."""
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)  # asks the processor once, and would be told another limit later
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """From here on, tensors of a step on a CPU take the memory of the last step's, in place of fresh pages that the
    system has to clear. A step is some 10 % faster, and holds more at its peak, since holes between tensors are not
    given back: what is built once is to be there before. On a GPU's host, where the environment says otherwise, or
    where the C library is not glibc, nothing changes.
    """
    if torch.cuda.is_available() or any(name.startswith(SETTINGS) for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        if any(library.mallopt(MMAP_THRESHOLD, size) for size in SIZES):
            library.mallopt(TRIM_THRESHOLD, 2**31 - 1)
