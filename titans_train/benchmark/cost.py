"""What a forward and backward costs: time, peak memory, and what is kept in between; with all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.benchmark.device import DTYPES, matmul_rate, peak_bytes, steady_seconds

AT_LEAST = 1.5  # seconds that a case is repeated for
WARM_UP = 256  # tokens


@dataclass(frozen=True)
class Work:
    """On inputs that are there already."""

    forward: Callable[[], Tensor]  # the output
    leaves: Sequence[Tensor]  # whose gradients are wanted: inputs, parameters
    parameters: Sequence[Tensor] = ()  # of these, what is there without any token
    countable: bool = True  # False: torch.func is in it, which allows no look at what is kept

    def run(self) -> None:
        self._backward(self.forward())

    def _backward(self, y: Tensor) -> None:
        y.square().sum().backward()
        for leaf in self.leaves:
            leaf.grad = None

    def kept_bytes(self) -> int:
        """Of storages that the backward needs from the forward, inputs included, parameters not."""
        with counting_kept(self.parameters) as kept:
            y = self.forward()
        self._backward(y)
        return sum(kept.values())


@contextmanager
def counting_kept(without: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """At its end {storage: bytes} is filled: of what operations within have saved for their backward, each once.

    Valid while the graph is alive. `without`: tensors that do not count.
    """
    known = {t.untyped_storage()._cdata for t in without}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept


def measure(
    prepare: Callable[[int], Work], length: int, device: str, dtype: str, *,
    batch: int = 1, flops: float | None = None, compiled: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Figures of `prepare(length)` in a process that has done nothing else.

    batch: sequences of `length` tokens; flops: of a token, forward and backward, for the utilisation. compiled: by
    torch.compile, which is to see the length that counts.
    """
    prepare(length if device == "cuda" or compiled else min(length, WARM_UP)).run()  # allocator, threads, kernels
    work, tokens = prepare(length), batch * length
    kept: list[int] = []
    peak = peak_bytes(lambda: kept.append(work.kept_bytes()) if work.countable else work.run(), device)
    seconds = steady_seconds(work.run, device, AT_LEAST)
    rate = matmul_rate(device, DTYPES[dtype])
    figures = {
        "tokens_per_second": tokens / seconds, "seconds_per_token": seconds / tokens, "peak_mib": peak / 2**20,
        "matmul_gflops": rate / 1e9,
    }  # fmt: skip
    if kept:
        figures["activation_kib_per_token"] = kept[0] / 1024 / tokens
    if flops is not None:
        figures["utilisation"] = flops * tokens / seconds / rate
    return figures
