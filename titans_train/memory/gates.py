"""Gate coefficients of a chunk: how much of the anchor state and of each write is left at each token.

By the definition, with e_i the write of token i (minus its gradient), every token's state is a combination
of the state at the anchor and the writes so far:

    S_t = E_t S_0 + sum_i F[t, i] e_i            W_t = A_t W_0 + B_t S_0 + sum_i C[t, i] e_i

so the recursion of the definition, run on rows of coefficients, gives them: exact at alpha = 1 and eta = 0,
where differences of cumulated logarithms give NaN. All chunks of a segment run at once; the backward is the
same recursion in reverse.

Shapes: n = batch * heads, c chunks, b tokens per chunk. A row has the columns [W_0 | S_0 | e_1 ... e_b].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """Rows over time, kept for the backward: decayed [b, n, c, b + 2] and momentum [b, n, c, b + 2]."""

    weight_rows: Tensor
    momentum_rows: Tensor

    def chunk(self, j: int) -> ChunkCoefficients:
        rows, last = self.weight_rows[:, :, j], self.momentum_rows[-1, :, j]
        by_row = rows.transpose(0, 1)
        return ChunkCoefficients(
            anchor=by_row[:, :, 0:1].contiguous(),
            anchor_momentum=by_row[:, :, 1:2].contiguous(),
            writes=by_row[:, :, 2:].contiguous(),
            end_anchor=rows[-1, :, 0, None, None],
            end_anchor_momentum=rows[-1, :, 1, None, None],
            end_writes=rows[-1, :, 2:, None],
            end_momentum=last[:, 1, None, None],
            end_momentum_writes=last[:, 2:, None],
        )


@dataclass(frozen=True)
class ChunkCoefficients:
    """One chunk of T tokens. All positive: the minus of the gradient step stands in the formulas."""

    anchor: Tensor  # A: [n, T, 1]
    anchor_momentum: Tensor  # B: [n, T, 1]
    writes: Tensor  # C: [n, T, T], zero above the diagonal
    end_anchor: Tensor  # A_b: [n, 1, 1]
    end_anchor_momentum: Tensor  # B_b: [n, 1, 1]
    end_writes: Tensor  # C[b]: [n, T, 1]
    end_momentum: Tensor  # E_b: [n, 1, 1]
    end_momentum_writes: Tensor  # F[b]: [n, T, 1]


def coefficients(keep: Tensor, eta: Tensor | None, theta: Tensor) -> Coefficients:
    """keep = 1 - alpha, eta, theta: [n, c, b]; eta None means no momentum."""
    n, c, b = theta.shape
    weight_rows = theta.new_zeros(b, n, c, b + 2)
    momentum_rows = theta.new_zeros(b, n, c, b + 2)
    keep_t, theta_t = keep.permute(2, 0, 1).contiguous(), theta.permute(2, 0, 1).contiguous()
    eta_t = None if eta is None else eta.permute(2, 0, 1).contiguous()
    for t in range(b):
        used = slice(0, t + 2)  # later columns are still zero
        row = momentum_rows[t]
        if eta_t is not None:
            if t == 0:
                row[..., 1] = eta_t[0]
            else:
                torch.mul(momentum_rows[t - 1, ..., used], eta_t[t, ..., None], out=row[..., used])
        row[..., t + 2] = theta_t[t]
        now = slice(0, t + 3)
        if t == 0:
            weight_rows[0, ..., 0] = keep_t[0]
            weight_rows[0, ..., 1:3] = row[..., 1:3]
        else:
            torch.addcmul(
                row[..., now], weight_rows[t - 1, ..., now], keep_t[t, ..., None], out=weight_rows[t, ..., now]
            )
    return Coefficients(weight_rows, momentum_rows)


def coefficients_backward(
    coef: Coefficients, d_weight_rows: Tensor, d_last_momentum: Tensor, keep: Tensor, eta: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of keep, eta and theta, each [n, c, b].

    d_weight_rows [b, n, c, b + 2] is used up as working space; d_last_momentum [n, c, b + 2] belongs to the
    last momentum row.
    """
    b, n, c, _ = d_weight_rows.shape
    d_keep, d_theta = keep.new_empty(b, n, c), keep.new_empty(b, n, c)
    d_eta = None if eta is None else torch.zeros_like(d_keep)
    lam = d_weight_rows[b - 1]  # adjoint of the weight row
    sig = lam + d_last_momentum  # adjoint of the momentum row
    for t in range(b - 1, -1, -1):
        d_theta[t] = sig[..., t + 2]
        if t == 0:
            d_keep[0] = lam[..., 0]
            if d_eta is not None:
                d_eta[0] = sig[..., 1]
            break
        used = slice(0, t + 2)
        torch.sum(lam[..., used] * coef.weight_rows[t - 1, ..., used], dim=-1, out=d_keep[t])
        previous = d_weight_rows[t - 1]
        previous[..., used].addcmul_(lam[..., used], keep[..., t, None])
        if d_eta is None or eta is None:
            sig = previous
        else:
            torch.sum(sig[..., used] * coef.momentum_rows[t - 1, ..., used], dim=-1, out=d_eta[t])
            sig = torch.addcmul(previous[..., used], sig[..., used], eta[..., t, None])
        lam = previous
    to_gate = (d_keep.permute(1, 2, 0), None if d_eta is None else d_eta.permute(1, 2, 0), d_theta.permute(1, 2, 0))
    return to_gate
