"""Causal depthwise convolution that restarts at document starts and carries its last inputs.

Shapes: x [B, L, D]; tail [B, K - 1, D], the inputs before x; positions [B, L], tokens since the document's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.fusion import fused
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

    def __init__(
        self, width: int, taps: int, parts: Parts, start: tuple[float, ...] = (1.0,), compile: bool = False
    ) -> None:
        super().__init__()
        self.taps = taps
        self.fuse = compile
        if taps == 1:
            self.register_parameter("weight", None)
        else:
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

    def forward(
        self, x: Tensor, tail: Tensor, positions: Tensor | None, heads: int | None = None, unit: bool = False
    ) -> Tensor:
        """x [B, L, D] -> y; `tail`: the K - 1 inputs before x. heads: given, y is finished, as `finished` says."""
        return fused(convolved, self.fuse)(x, tail, self.weight, positions, heads, unit)


def convolved(
    x: Tensor, tail: Tensor, weight: Tensor | None, positions: Tensor | None, heads: int | None, unit: bool
) -> Tensor:
    """weight [K, D]; None: K = 1."""
    y, length = x, x.shape[1]
    if weight is not None:
        taps, padded, y = weight.shape[0], torch.cat([tail.to(x.dtype), x], dim=1), x * weight[0]
        for j in range(1, taps):
            shifted = padded[:, taps - 1 - j : taps - 1 - j + length]
            if positions is not None:
                shifted = shifted * (positions >= j)[:, :, None]
            y = torch.addcmul(y, shifted, weight[j])
    return y if heads is None else finished(y, heads, unit)


def finished(y: Tensor, heads: int, unit: bool) -> Tensor:
    """SiLU and, with `unit`, length 1 in each head: [B, L, H d] -> [B, H, L, d], in that order for the scan."""
    y = F.silu(y).unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
    return F.normalize(y, dim=-1, eps=1e-6) if unit else y


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
    heads: int,
    unit: Sequence[bool],
) -> tuple[Three, Three]:
    """Of a memory's q, k and v: what the convolutions make of them, finished ([B, H, L, d], `unit` for each), and the
    tails that go on to the right.

    across: given, these are a shard's tokens, and `tails` those before the first shard.
    """
    q, k, v = inputs
    after = tuple(c.tail(x, t, positions) for c, x, t in zip(convolutions, inputs, tails, strict=True))
    if across is not None and convolutions[0].taps > 1:
        q = across.send("tails", q, after)
        tails = tuple(across.receive("tails", tails))  # type: ignore[assignment]
    each = zip(convolutions, (q, k, v), tails, unit, strict=True)
    made = tuple(c(x, t, positions, heads, one) for c, x, t, one in each)
    return made, after  # type: ignore[return-value]
