"""Gate coefficients (../gates.py) and their gradients, a program for each row and chunk: the recursion over a chunk's
tokens stays in registers.

Shapes: keep, eta, theta [rows, chunks, T]; coefficient rows [T, rows, chunks, T + 2].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_train.memory.gates import Coefficients


@triton.jit(do_not_specialize=["rows", "chunks"])
def _forward(
    keep, eta, theta, weight_rows, momentum_rows, rows, chunks, T, MOMENTUM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * chunks + tl.program_id(1)
    column = tl.arange(0, BLOCK)
    dtype: tl.constexpr = weight_rows.dtype.element_ty
    weight = (column == 0).to(dtype)
    momentum = (column == 1).to(dtype)
    for t in range(T):
        written = tl.where(column == t + 2, tl.load(theta + place * T + t), 0).to(dtype)
        momentum = tl.load(eta + place * T + t) * momentum + written if MOMENTUM else written
        weight = tl.load(keep + place * T + t) * weight + momentum
        at = (t * rows * chunks + place) * (T + 2) + column
        tl.store(weight_rows + at, weight, mask=column < T + 2)
        tl.store(momentum_rows + at, momentum, mask=column < T + 2)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _backward(
    keep, eta, weight_rows, momentum_rows, d_weight_rows, d_last_momentum, d_keep, d_eta, d_theta, rows, chunks, T,
    MOMENTUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * chunks + tl.program_id(1)
    column = tl.arange(0, BLOCK)
    dtype: tl.constexpr = weight_rows.dtype.element_ty
    d_weight = tl.zeros([BLOCK], dtype)
    d_momentum = tl.load(d_last_momentum + place * (T + 2) + column, mask=column < T + 2, other=0.0)
    for step in range(T):
        t = T - 1 - step
        # what row t gives, and what it has from row t + 1; later columns of a row are no coefficients
        at = (t * rows * chunks + place) * (T + 2) + column
        given = tl.load(d_weight_rows + at, mask=column < t + 3, other=0.0)
        if step == 0:
            d_weight = given
        else:
            d_weight = given + tl.where(column < t + 3, d_weight * tl.load(keep + place * T + t + 1), 0)
        if step == 0:
            d_momentum += d_weight
        elif MOMENTUM:
            carried = d_momentum * tl.load(eta + place * T + t + 1)
            d_momentum = d_weight + tl.where(column < t + 3, carried, 0)
        else:
            d_momentum = d_weight
        tl.store(d_theta + place * T + t, tl.sum(tl.where(column == t + 2, d_momentum, 0)))
        before = at - rows * chunks * (T + 2)
        inside = (column < T + 2) & (column < t * (T + 2))  # before the first row there is the anchor
        weight = tl.load(weight_rows + before, mask=inside, other=0.0)
        weight += ((column == 0) & (column >= t * (T + 2))).to(dtype)
        tl.store(d_keep + place * T + t, tl.sum(d_weight * weight))
        if MOMENTUM:
            momentum = tl.load(momentum_rows + before, mask=inside, other=0.0)
            momentum += ((column == 1) & (column > t * (T + 2))).to(dtype)
            tl.store(d_eta + place * T + t, tl.sum(d_momentum * momentum))


def coefficients(keep: Tensor, eta: Tensor | None, theta: Tensor) -> Coefficients:
    """As gates.coefficients."""
    n, c, b = theta.shape
    weight_rows, momentum_rows = (theta.new_empty(b, n, c, b + 2) for _ in range(2))
    _forward[(n, c)](
        keep.contiguous(), None if eta is None else eta.contiguous(), theta.contiguous(), weight_rows, momentum_rows,
        n, c, b, MOMENTUM=eta is not None, BLOCK=triton.next_power_of_2(b + 2),
    )  # fmt: skip
    return Coefficients(weight_rows, momentum_rows)


def coefficients_backward(
    coef: Coefficients, d_weight_rows: Tensor, d_last_momentum: Tensor, keep: Tensor, eta: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As gates.coefficients_backward; d_weight_rows stays as it is."""
    b, n, c, _ = d_weight_rows.shape
    d_keep, d_theta = (keep.new_empty(n, c, b) for _ in range(2))
    d_eta = None if eta is None else torch.empty_like(d_keep)
    _backward[(n, c)](
        keep.contiguous(), None if eta is None else eta.contiguous(), coef.weight_rows, coef.momentum_rows,
        d_weight_rows.contiguous(), d_last_momentum.contiguous(), d_keep, d_eta, d_theta, n, c, b,
        MOMENTUM=eta is not None, BLOCK=triton.next_power_of_2(b + 2),
    )  # fmt: skip
    return d_keep, d_eta, d_theta
