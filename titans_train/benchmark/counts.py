"""What a computation is made of: operator calls, FLOPs of products, bytes that calls read and write.

On the meta device nothing is computed, so that counts are exact, quick and the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from titans_train.errors import UserError
from titans_train.memory import MemoryState, memory_scan, recurrence
from titans_train.memory.kernels import compiled

ALLOCATION = ("empty", "new_empty", "empty_like")


@dataclass(frozen=True)
class Counts:
    calls: float  # that compute: views and allocations are none
    flops: float
    bytes: float  # of operands and results, each call by itself, as if nothing stayed in a cache

    def per(self, number: int) -> Counts:
        return Counts(**{name: value / number for name, value in asdict(self).items()})


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = func._schema.name.removeprefix("aten::")
        if not view and name not in ALLOCATION:
            self.calls[name] += 1
            # what is changed in place counts twice: it is read and written
            moved = [t for t in tree_leaves((args, kwargs or {}, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in moved)
        return out


def baddbmm_flops(out: Any, a: Any, b: Any, **_: Any) -> int:
    """Of shapes."""
    return int(2 * a[0] * a[1] * a[2] * b[2])


def count(run: Callable[[], object]) -> Counts:
    """Of one call of `run`, its backward included if it has one."""
    mapping = {torch.ops.aten.baddbmm_: baddbmm_flops}  # torch counts baddbmm only
    calls, flops = _Calls(), FlopCounterMode(display=False, custom_mapping=mapping)
    with flops, calls:
        run()
    return Counts(sum(calls.calls.values()), flops.get_total_flops(), calls.bytes)


def compiled_work(run: Callable[[], object]) -> tuple[int, int]:
    """Products and their FLOPs that the compiled scan makes in one call of `run`, by its own count."""
    if (reason := compiled.why_not()) is not None:
        raise UserError(reason)
    before = torch.ops.titans_train.scan_work()
    run()
    products, flops = (after - b for after, b in zip(torch.ops.titans_train.scan_work(), before, strict=True))
    return products, flops


def operator(
    how: str, heads: int, d: int, hidden: int, chunk: int, length: int, store_every: int = 16, depth: int = 2
) -> Callable[[], None]:
    """Forward and backward with all gradients of the memory, one row of `heads`; how: recurrence (token by token) or
    dual (memory_scan in plain PyTorch) on the meta device, or compiled, of zeros. With momentum, forgetting and the
    norm inside.
    """

    def leaf(*shape: int) -> Tensor:
        if how == "compiled":
            return torch.zeros(*shape, requires_grad=True)
        return torch.empty(*shape, device="meta", requires_grad=True)

    def run() -> None:
        rows = (1, heads, length)
        sizes = [d, *[hidden] * (depth - 1), d]
        state = MemoryState.start(tuple(leaf(1, heads, a, b) for a, b in zip(sizes, sizes[1:], strict=False)))
        given = [*(F.normalize(leaf(*rows, d), dim=-1) for _ in range(3)), *(leaf(*rows) for _ in range(3)), state]
        options: dict[str, Any] = {"chunk_size": chunk, "gain": leaf(heads, d), "bias": leaf(heads, d)}
        if how == "recurrence":
            y, _ = recurrence(*given, **options)  # type: ignore[arg-type, misc]
        else:
            options |= {"store_every": store_every, "kernels": "plain" if how == "dual" else how}
            y, _ = memory_scan(*given, **options)  # type: ignore[arg-type, misc]
        y.sum().backward()

    return run
