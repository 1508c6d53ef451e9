"""Causal depthwise convolution that restarts at document starts and carries its last inputs.

Shapes: x [B, L, D]; tail [B, K - 1, D], the inputs before x; positions [B, L], tokens since the document's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from titans_train.shape import MemoryShape

if TYPE_CHECKING:
    from titans_train.models.neighbours import Neighbours
    from titans_train.models.parts import Parts

Three = tuple[Tensor, Tensor, Tensor]


def document_positions(document_starts: Tensor | None) -> Tensor | None:
    """[B, L] bool -> [B, L] tokens since the last start in this call; very large before the first one."""
    if document_starts is None:
        return None
    index = torch.arange(document_starts.shape[1], device=document_starts.device)
    last = torch.where(document_starts, index, -(2**40)).cummax(dim=1).values
    return index - last


class CausalConvolution(nn.Module):
    """y_t = sum_j weight[j] * x_{t-j}, per channel, j < K. K = 1 is no convolution.

    Starts near `start`, the first taps: (1,) is the identity.
    """

    def __init__(self, width: int, taps: int, parts: Parts, start: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.taps = taps
        if taps > 1:
            weight = torch.randn(taps, width) * 0.02
            for j, value in enumerate(start[:taps]):
                weight[j] += value
            self.weight = parts.parameter(weight, 1)

    def tail(self, x: Tensor, before: Tensor, positions: Tensor | None) -> Tensor:
        """The last K - 1 inputs after x, which the next call continues from; `before`: those before x.

        A tail must not reach back over the last document's start.
        """
        if self.taps == 1:
            return before
        count = self.taps - 1
        tail = x[:, x.shape[1] - count :] if x.shape[1] >= count else torch.cat([before.to(x.dtype), x], 1)[:, -count:]
        if positions is None:
            return tail
        age = torch.arange(count - 1, -1, -1, device=x.device)
        return tail * (positions[:, -1:] >= age)[:, :, None]

    def forward(self, x: Tensor, tail: Tensor, positions: Tensor | None) -> Tensor:
        """x [B, L, D] -> y; `tail`: the K - 1 inputs before x."""
        if self.taps == 1:
            return x
        length = x.shape[1]
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        y = x * self.weight[0]
        for j in range(1, self.taps):
            shifted = padded[:, self.taps - 1 - j : self.taps - 1 - j + length]
            if positions is not None:
                shifted = shifted * (positions >= j)[:, :, None]
            y = torch.addcmul(y, shifted, self.weight[j])
        return y


def key_start(shape: MemoryShape) -> tuple[float, ...]:
    """First taps of the keys' convolution: a key made of two tokens can stand for the first while the value stands for
    the second, which is what recall needs."""
    return (0.7, 0.7) if shape.key_start == "pair" else (1.0,)


def convolve(
    convolutions: Sequence[CausalConvolution],
    inputs: Sequence[Tensor],
    tails: Three,
    positions: Tensor | None,
    across: Neighbours | None,
) -> tuple[Three, Three]:
    """Of a memory's q, k and v: what the convolutions make of them, and the tails that go on to the right.

    across: given, these are a shard's tokens, and `tails` those before the first shard.
    """
    q, k, v = inputs
    after = tuple(c.tail(x, t, positions) for c, x, t in zip(convolutions, inputs, tails, strict=True))
    if across is not None and convolutions[0].taps > 1:
        q = across.send("tails", q, after)
        tails = tuple(across.receive("tails", tails))  # type: ignore[assignment]
    made = tuple(c(x, t, positions) for c, x, t in zip(convolutions, (q, k, v), tails, strict=True))
    return made, after  # type: ignore[return-value]
