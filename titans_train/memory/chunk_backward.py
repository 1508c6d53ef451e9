"""Backward of one chunk: `chunk.py` read in reverse. Shapes and names as there.

Order: the state update (from the adjoints of the state after the chunk), the read from the last layer to
the first, the inner gradients, the norm, the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.memory.activation import Activation
from titans_train.memory.chunk import Adjoints, Norm, Saved
from titans_train.memory.gates import ChunkCoefficients


@dataclass
class ChunkGradients:
    q: Tensor
    k: Tensor
    v: Tensor
    gain: Tensor | None  # [n, T, d] products, to be summed over tokens by the caller
    bias: Tensor | None
    # of the coefficients, in the layout of `Coefficients` rows
    weight_rows: Tensor  # [n, T, T + 2]
    last_momentum_row: Tensor  # [n, T + 2]


def row_sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-1, keepdim=True)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> per batch and head: [n, d_in, d_out] twice -> [n]."""
    return (a * b).sum(dim=(1, 2))  # a batched dot product through bmm is ten times slower on a CPU


def _update_backward(
    c: ChunkCoefficients,
    weights: list[Tensor],
    momentum: list[Tensor],
    s: Saved,
    adj: Adjoints,
    rows: Tensor,
    last: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Reverse of `chunk_update`. Returns neg_x, neg_delta per layer; adds to the coefficient gradients."""
    neg_x, neg_delta = [], []
    for n, w in enumerate(weights):
        x, delta, vw = s.inputs[n], s.deltas[n], adj.weights[n]
        pairs = [(c.end_writes, vw, rows[:, -1, 2:, None])]
        if momentum:
            pairs.append((c.end_momentum_writes, adj.momentum[n], last[:, 2:, None]))
        narrow_x = w.shape[-2] <= w.shape[-1]
        nx, nd = None, None
        for scale, adjoint, d_scale in pairs:
            if narrow_x:
                through = torch.bmm(delta, adjoint.mT)
                d_scale -= row_sum(through, x)
                nx = scale * through if nx is None else nx.addcmul_(scale, through)
                wide, weight = scale * x, adjoint
                nd = torch.bmm(wide, weight) if nd is None else nd.baddbmm_(wide, weight)
            else:
                through = torch.bmm(x, adjoint)
                d_scale -= row_sum(through, delta)
                nd = scale * through if nd is None else nd.addcmul_(scale, through)
                wide, weight = scale * delta, adjoint.mT
                nx = torch.bmm(wide, weight) if nx is None else nx.baddbmm_(wide, weight)
        assert nx is not None and nd is not None
        neg_x.append(nx)
        neg_delta.append(nd)
        rows[:, -1, 0] += inner(vw, w)
        if momentum:
            vs = adj.momentum[n]
            rows[:, -1, 1] += inner(vw, momentum[n])
            last[:, 1] += inner(vs, momentum[n])
            vs.mul_(c.end_momentum).addcmul_(vw, c.end_anchor_momentum)
        vw.mul_(c.end_anchor)
    return neg_x, neg_delta


def _read_backward(
    d_out: Tensor,
    c: ChunkCoefficients,
    weights: list[Tensor],
    momentum: list[Tensor],
    base: list[Tensor],
    s: Saved,
    act: Activation,
    adj: Adjoints,
    neg: tuple[list[Tensor], list[Tensor]],
    rows: Tensor,
) -> Tensor:
    """Reverse of `read`. Returns the gradient of q; adds to the adjoints, neg and the coefficient gradients."""
    neg_x, neg_delta = neg
    for n in range(len(weights) - 1, -1, -1):
        y, x, delta, w = s.reads[n], s.inputs[n], s.deltas[n], weights[n]
        scores, d_scores = torch.bmm(y, x.mT), torch.bmm(d_out, delta.mT)
        rows[:, :, 2:].addcmul_(scores, d_scores, value=-1)
        d_masked, masked = d_scores.mul_(c.writes), scores.mul_(c.writes)
        neg_delta[n].baddbmm_(masked.mT, d_out)
        neg_x[n].baddbmm_(d_masked.mT, y)
        d_y = torch.bmm(d_masked, x).neg_()
        sources = [(c.anchor, w, adj.weights[n], rows[:, :, 0:1])]
        if momentum:
            sources.append((c.anchor_momentum, momentum[n], adj.momentum[n], rows[:, :, 1:2]))
        narrow_in = w.shape[-2] <= w.shape[-1]
        for scale, weight, adjoint, d_scale in sources:
            if narrow_in:
                through = torch.bmm(d_out, weight.mT)
                d_y.addcmul_(scale, through)
                d_scale += row_sum(through, y)
                adjoint.baddbmm_((scale * y).mT, d_out)
            else:
                scaled = scale * d_out
                d_y.baddbmm_(scaled, weight.mT)
                d_scale += row_sum(d_out, torch.bmm(y, weight))
                adjoint.baddbmm_(y.mT, scaled)
        if base:
            d_y.baddbmm_(d_out, base[n].mT)
            adj.base[n].baddbmm_(y.mT, d_out)
        d_out = act.times_slope(d_y, s.read_pre[n - 1]) if n else d_y
    return d_out


def _inner_backward(
    anchor: list[Tensor],
    s: Saved,
    act: Activation,
    norm: Norm | None,
    adj: Adjoints,
    neg: tuple[list[Tensor], list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Reverse of `inner_gradients`. Returns negated gradients of k, -v (= gradient of v), gain and bias products."""
    neg_x, neg_delta = neg
    depth = len(anchor)
    neg_pre: list[Tensor] = []
    for n in range(1, depth):  # D_n = (D_{n+1} W_{n+1}^T) * f'(Z_n), innermost last
        d = neg_delta[n - 1]
        neg_back = act.times_slope(d, s.pre[n - 1])
        neg_pre.append(act.curvature(s.pre[n - 1]).mul_(s.back[n - 1]).mul_(d))
        neg_delta[n].baddbmm_(neg_back, anchor[n])
        adj.anchor[n].baddbmm_(neg_back.mT, s.deltas[n], alpha=-1)
    d_v, d_gain = neg_delta[-1], None
    neg_out, neg_k = neg_delta[-1], None
    if norm is not None:
        assert s.write_norm is not None and s.error is not None
        u = norm.gain * s.error
        neg_u, neg_out = s.write_norm.pull_backward(u, s.deltas[-1], neg_delta[-1])
        d_v = norm.gain * neg_u  # negated gradient of the error = gradient of v
        d_gain = torch.addcmul(neg_u * s.error, d_v, s.write_norm.value)
        neg_out = neg_out + s.write_norm.pull(norm.gain * d_v)
        neg_k = d_v
    for n in range(depth - 1, -1, -1):
        neg_x[n].baddbmm_(neg_out, anchor[n].mT)
        adj.anchor[n].baddbmm_(s.inputs[n].mT, neg_out, alpha=-1)
        if n:
            neg_out = neg_pre[n - 1].add_(act.times_slope(neg_x[n], s.pre[n - 1]))
    neg_k = neg_x[0] if neg_k is None else neg_x[0].add_(neg_k)
    return neg_k, d_v, d_gain, None if norm is None else d_v


def chunk_backward(
    d_y: Tensor,
    c: ChunkCoefficients,
    anchor: list[Tensor],
    weights: list[Tensor],
    momentum: list[Tensor],
    base: list[Tensor],
    s: Saved,
    act: Activation,
    norm: Norm | None,
    adj: Adjoints,
) -> ChunkGradients:
    """d_y: [n, T, d]. `adj` holds the adjoints of the state after the chunk and leaves with those before it."""
    n, tokens, _ = d_y.shape
    rows, last = d_y.new_zeros(n, tokens, tokens + 2), d_y.new_zeros(n, tokens + 2)
    neg = _update_backward(c, weights, momentum, s, adj, rows, last)
    d_out, d_gain = d_y, None
    if norm is not None:
        assert s.read_norm is not None
        d_gain = d_y * s.read_norm.value
        d_out = s.read_norm.pull(norm.gain * d_y)
    d_q = _read_backward(d_out, c, weights, momentum, base, s, act, adj, neg, rows)
    neg_k, d_v, neg_gain, neg_bias = _inner_backward(anchor, s, act, norm, adj, neg)
    if norm is None:
        return ChunkGradients(d_q, neg_k.neg_(), d_v, None, None, rows, last)
    assert d_gain is not None and neg_gain is not None and neg_bias is not None
    return ChunkGradients(d_q + d_y, neg_k.neg_(), d_v, d_gain - neg_gain, d_y - neg_bias, rows, last)
