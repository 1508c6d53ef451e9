"""Cross-entropy over a vocabulary that may be split over devices, without a float32 copy of the logits.

Rows are widened block by block. What is kept for the backward is the logits as they are and two numbers per token; the
gradient has the logits' dtype. Shapes: N tokens, V vocabulary (this device's share).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 22  # numbers that are widened at a time

Combine = Callable[[Tensor, str], None]  # over the shares of a vocabulary, in place: "max" or "sum"


def alone(x: Tensor, how: str) -> None:
    """The vocabulary is whole."""


def token_losses(logits: Tensor, labels: Tensor, first: int = 0, combine: Combine = alone) -> Tensor:
    """Cross-entropies [N], float32 or better, of logits [N, V] for vocabulary from `first` on; label below 0: 0.

    Label that no share has: NaN.
    """
    losses: Tensor = _TokenLosses.apply(logits, labels, first, combine)
    return losses


def _blocks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits widened (a copy)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    count = max(1, BLOCK // logits.shape[1])
    for start in range(0, logits.shape[0], count):
        rows = slice(start, start + count)
        yield rows, logits[rows].to(wide, copy=True)


def _own(labels: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Place of each label in this share, anywhere if it is in another; and whether it is here."""
    place = labels - first
    return place.clamp(0, width - 1), (labels >= 0) & (place >= 0) & (place < width)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, combine: Combine) -> Tensor:
        place, here = _own(labels, first, logits.shape[1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        most = logits.amax(-1).to(wide)
        combine(most, "max")
        sums = most.new_zeros(3, len(most))  # of exponentials; the label's logit above the most; shares that have it
        for rows, x in _blocks(logits):
            x -= most[rows, None]
            picked = x.gather(1, place[rows, None])[:, 0]
            sums[1, rows] = torch.where(here[rows], picked, 0)
            sums[2, rows] = here[rows].to(sums.dtype)
            sums[0, rows] = x.exp_().sum(-1)
        combine(sums, "sum")
        log_sums = sums[0].log()
        ctx.save_for_backward(logits, place, here, labels >= 0, most, log_sums)
        losses = torch.where(sums[2] > 0, log_sums - sums[1], torch.nan)
        return torch.where(labels >= 0, losses, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor, None, None, None]:
        logits, place, here, counts, most, log_sums = ctx.saved_tensors
        d_losses = torch.where(counts, d_losses, 0)
        gradient = torch.empty_like(logits)
        for rows, x in _blocks(logits):
            x.sub_(most[rows, None]).sub_(log_sums[rows, None]).exp_()  # exact also where all logits are large
            x.scatter_add_(1, place[rows, None], -here[rows, None].to(x.dtype))
            gradient[rows] = x.mul_(d_losses[rows, None])
        return gradient, None, None, None
