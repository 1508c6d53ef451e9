"""Bytes in tensors: every storage that an operation returns, counted while it lives.

On a CPU this is what a GPU's allocator would be asked for, without the Python process, its libraries and freed pages
that resident memory has. Buffers inside an operation's own C++ code are not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Within `with TensorMemory() as memory`: memory.now, memory.peak (bytes), and what lives at the peak.

    at_peak: bytes by the operation that made the storage. Only storages made within are counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.at_peak: Counter[str] = Counter()
        self._live: dict[int, weakref.ref[Any]] = {}
        self._by_operation: Counter[str] = Counter()

    def reset_peak(self) -> None:
        self.peak, self.at_peak = self.now, Counter(self._by_operation)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._add(leaf.untyped_storage(), str(function))
        if self.now > self.peak:
            self.reset_peak()
        return out

    def _add(self, storage: torch.UntypedStorage, operation: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or size == 0:
            return

        def gone(_: Any) -> None:
            del self._live[key]
            self.now -= size
            self._by_operation[operation] -= size

        self._live[key] = weakref.ref(storage, gone)
        self.now += size
        self._by_operation[operation] += size
