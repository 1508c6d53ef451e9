"""The linear memory (depth 1, no norm inside): a stretch of tokens as one affine map of the state.

M_W(k) = k W makes the inner gradient k^T (k W - v) linear in W, so that the state after some chunks is affine in
the state before them, and its adjoint runs backward without any state:

    [W; S] <- T [W; S] + U                       [dW; dS] <- T^T [dW; dS] + (what the outputs inside add)

T is found with the chunk update itself. The recursion takes each column of W and S on its own, together with that
column of v, so the update also runs on wider matrices: from the columns [I | 0 | 0] of W and [0 | I | 0] of S,
written with the values [0 | 0 | v], it ends at [T | U]. Where a document starts, its row takes the document state
[0 | 0 | W_doc], [0 | 0 | S_doc] and so forgets what came before: T = 0 there.

Shapes: n = batch * heads; L tokens, the first of them at a chunk border; d head width; W, S [n, d, d];
m = 2 d, or d without momentum (no S); T [n, m, m], U [n, m, d]. States are lists as elsewhere: [W], and [S] or [].
Nothing here is differentiated by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from titans_train.memory.chunk import chunk_update_, inner_gradients, scaled_product
from titans_train.memory.gates import coefficients
from titans_train.memory.walk import Segment, Sequence

WeightsMomentum = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Affine:
    """The map [W; S] -> T [W; S] + U."""

    T: Tensor  # [n, m, m]
    U: Tensor  # [n, m, d]

    def apply(self, weights: list[Tensor], momentum: list[Tensor]) -> WeightsMomentum:
        """The state after, from the state before."""
        return self._parts(torch.baddbmm(self.U, self.T, torch.cat([*weights, *momentum], dim=1)))

    def flat(self) -> Tensor:
        """[T | U] in one tensor [n, m, m + d]: 6 d^2 numbers per head, 2 d^2 without momentum."""
        return torch.cat([self.T, self.U], dim=2)

    @classmethod
    def from_flat(cls, flat: Tensor) -> Affine:
        m = flat.shape[1]
        return cls(flat[:, :, :m], flat[:, :, m:])

    def _parts(self, stacked: Tensor) -> WeightsMomentum:
        parts = [part.contiguous() for part in torch.split(stacked, self.U.shape[2], dim=1)]
        return parts[:1], parts[1:]


def shard_map(seq: Sequence, grid: list[Segment]) -> Affine:
    """The map from the state before the first token to the state after the last. Reads no queries.

    grid: the scan's; coefficients are made for a segment at a time, as there.
    Products per token and head: (k W), and the updates of W and of S, all d x (m + d): 18 d^2 FLOPs; without
    momentum 8 d^2.
    """
    _check_linear(seq)
    n, _, d = seq.k.shape
    m = d if seq.eta is None else 2 * d
    identity = torch.eye(m, m + d, dtype=seq.k.dtype, device=seq.k.device).expand(n, m, m + d)
    state = [part.clone() for part in torch.split(identity, d, dim=1)]  # W, then S, with columns [T | U]
    document = [pad(x, (m, 0)) for x in (*seq.document_weights, *seq.document_momentum)]
    for segment in grid:
        coef = coefficients(*seq.gates(segment))
        for j, span in enumerate(segment.spans()):
            rows = seq.document_rows(span.start)
            if rows is not None:
                state = [torch.where(rows, x, y) for x, y in zip(document, state, strict=True)]
            saved = inner_gradients(seq.k[:, span], pad(seq.v[:, span], (m, 0)), state[:1], seq.act, None)
            chunk_update_(coef.chunk(j), state[:1], state[1:], saved)
    return Affine.from_flat(torch.cat(state, dim=1))


def start_adjoint(seq: Sequence, d_y: Tensor, grid: list[Segment]) -> WeightsMomentum:
    """Gradient of the state before the first token, from d_y [n, L, d] alone: zero for the state after the last.

    A chunk with D = K W - V and P = (Q K^T) * C, in reverse (design: dual form), is

        Y = A * (Q W) + B * (Q S) - P D          -dD = P^T dY + C_b * (K dW) + F_b * (K dS)
        W <- A_b W + B_b S - K^T (C_b * D)        dW <- A_b dW            + Q^T (A * dY) - K^T (-dD)
        S <-         E_b S - K^T (F_b * D)        dS <- B_b dW + E_b dS   + Q^T (B * dY)

    so neither values nor states are read. A row in which a document starts does not depend on what came before.
    Products per token and head, for chunks of b tokens: Q K^T, P^T dY; K dW, Q^T dY, K^T dD, and with momentum
    K dS, Q^T dY: 10 d^2 + 4 b d FLOPs; without momentum 6 d^2 + 4 b d.
    """
    _check_linear(seq)
    n, _, d = seq.k.shape
    d_weights = seq.k.new_zeros(n, d, d)
    d_momentum = torch.zeros_like(d_weights)
    for segment in reversed(grid):
        coef = coefficients(*seq.gates(segment))
        for j, span in reversed(list(enumerate(segment.spans()))):
            c, q, k, d_out = coef.chunk(j), seq.q[:, span], seq.k[:, span], d_y[:, span]
            neg_d = torch.bmm(torch.bmm(q, k.mT).mul_(c.writes).mT, d_out)
            neg_d += scaled_product(k, d_weights, c.end_writes)
            if seq.eta is not None:
                neg_d += scaled_product(k, d_momentum, c.end_momentum_writes)
                d_momentum.mul_(c.end_momentum).addcmul_(d_weights, c.end_anchor_momentum)
                d_momentum.baddbmm_((c.anchor_momentum * q).mT, d_out)
            d_weights.mul_(c.end_anchor).baddbmm_((c.anchor * q).mT, d_out).baddbmm_(k.mT, neg_d, alpha=-1)
            rows = seq.document_rows(span.start)
            if rows is not None:
                d_weights.masked_fill_(rows, 0)
                d_momentum.masked_fill_(rows, 0)
    return [d_weights], [] if seq.eta is None else [d_momentum]


def _check_linear(seq: Sequence) -> None:
    if seq.norm is not None:
        raise ValueError("a memory with a norm inside is not linear: its scan has no affine form")
