"""One chunk of the memory in matrix form, forward and backward, for any depth (design: dual form).

With X_n the inputs and D_n ("deltas") the output gradients of layer n for the chunk's keys at the anchor
weights, and C the gate coefficients, the read of layer n at every token t at once is

    Z W_t = A * (Z W_0) + B * (Z S_0) - ((Z X_n^T) * C) D_n

and the state after the chunk is W = A_b W_0 + B_b S_0 - X_n^T diag(C_b) D_n. Where forgetting leads to a base, W is
what stands above it, so that the anchor is base + W_0 and Z (base) comes to a read. The backward below is these
lines read in reverse; it computes *negated* adjoints of X and D ("neg_x", "neg_delta"), since both enter
with a minus.

Shapes: n = batch * heads; T tokens; q, k, v [n, T, d]; weights [n, d_in, d_out]. Gates scale the narrower
side of a product wherever there is a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.memory.activation import Activation
from titans_train.memory.gates import ChunkCoefficients
from titans_train.memory.norm import Normalised


@dataclass(frozen=True)
class Norm:
    gain: Tensor  # [n, 1, d]
    bias: Tensor


@dataclass
class Saved:
    """What the backward of a chunk needs from its forward. Lists run over the layers of the memory."""

    inputs: list[Tensor]  # X_n
    pre: list[Tensor]  # Z_n, before the activation
    back: list[Tensor]  # G_n = D_{n+1} W_{n+1}^T
    deltas: list[Tensor]  # D_n
    error: Tensor | None  # M(k) - v, kept with a norm
    write_norm: Normalised | None
    reads: list[Tensor]  # inputs of the read at layer n; reads[0] = q
    read_pre: list[Tensor]  # read outputs before the activation
    read_norm: Normalised | None


@dataclass
class Adjoints:
    """Running gradients of the state, updated in place from the chunk's end to its start."""

    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]  # the same tensors as `weights` but where the anchor is not the weights before the chunk
    base: list[Tensor]  # of the reads; the anchors' part comes to it with `anchor`


def inner_gradients(k: Tensor, v: Tensor, anchor: list[Tensor], act: Activation, norm: Norm | None) -> Saved:
    """Forward of the keys and closed-form gradient of 1/2 |M(k) - v|^2, all at the anchor weights."""
    inputs, pre = [k], []
    for w in anchor[:-1]:
        pre.append(torch.bmm(inputs[-1], w))
        inputs.append(act.value(pre[-1]))
    out = torch.bmm(inputs[-1], anchor[-1])
    error, write_norm = None, None
    if norm is None:
        delta = out.sub_(v)
    else:
        write_norm = Normalised.of(out)
        error = torch.addcmul(norm.bias + k, write_norm.value, norm.gain).sub_(v)
        delta = write_norm.pull(norm.gain * error)
    deltas: list[Tensor] = [delta]
    back: list[Tensor] = []
    for n in range(len(anchor) - 1, 0, -1):
        back.insert(0, torch.bmm(deltas[0], anchor[n].mT))
        deltas.insert(0, act.times_slope(back[0], pre[n - 1]))
    return Saved(inputs, pre, back, deltas, error, write_norm, [], [], None)


def scaled_product(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """diag(scale) x w, scaling the narrower side. scale: [n, T, 1]."""
    if w.shape[-2] <= w.shape[-1]:
        return torch.bmm(scale * x, w)
    return torch.bmm(x, w).mul_(scale)


def chunk_read(
    q: Tensor,
    weights: list[Tensor],
    momentum: list[Tensor],
    base: list[Tensor],
    c: ChunkCoefficients,
    s: Saved,
    act: Activation,
    norm: Norm | None,
) -> Tensor:
    """The causal read of every token, layer by layer: y [n, T, d]. Adds to `s` what the backward needs."""
    y = q
    for n, w in enumerate(weights):
        y = act.value(y) if n else y
        s.reads.append(y)
        out = scaled_product(y, w, c.anchor)
        if momentum:
            out += scaled_product(y, momentum[n], c.anchor_momentum)
        if base:
            out.baddbmm_(y, base[n])
        y = out.baddbmm_(torch.bmm(y, s.inputs[n].mT).mul_(c.writes), s.deltas[n], alpha=-1)
        s.read_pre.append(y)
    if norm is None:
        return y
    s.read_norm = Normalised.of(y)
    return torch.addcmul(norm.bias + q, s.read_norm.value, norm.gain)


def chunk_update_(c: ChunkCoefficients, weights: list[Tensor], momentum: list[Tensor], s: Saved) -> None:
    """Moves weights and momentum over the chunk, in place: fresh memory for each costs more than the products."""
    for n, w in enumerate(weights):
        x, delta = s.inputs[n], s.deltas[n]
        narrow_x = w.shape[-2] <= w.shape[-1]

        def write_(
            target: Tensor, scale: Tensor, x: Tensor = x, delta: Tensor = delta, narrow_x: bool = narrow_x
        ) -> None:
            left, right = ((scale * x).mT, delta) if narrow_x else (x.mT, scale * delta)
            target.baddbmm_(left, right, alpha=-1)

        w.mul_(c.end_anchor)
        if momentum:
            w.addcmul_(momentum[n], c.end_anchor_momentum)
            momentum[n].mul_(c.end_momentum)
            write_(momentum[n], c.end_momentum_writes)
        write_(w, c.end_writes)
