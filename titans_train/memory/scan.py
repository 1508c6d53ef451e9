"""The memory over a whole sequence, chunk by chunk, with an own backward that recomputes.

The forward keeps the state of every `store_every`-th chunk only. The backward takes these segments from last
to first, recomputes a segment's chunks from its stored state, and walks them in reverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.activation import ACTIVATIONS
from titans_train.memory.chunk import Adjoints, Norm
from titans_train.memory.chunk_backward import chunk_backward
from titans_train.memory.gates import coefficients_backward
from titans_train.memory.recurrence import memory_mlp
from titans_train.memory.state import MemoryState
from titans_train.memory.walk import Segment, Sequence, Walk, chunk_grid

memory_read = memory_mlp  # reading alone, M_W(q): nothing is written


@dataclass(frozen=True)
class Spec:
    """Everything about one call that carries no gradient."""

    grid: list[Segment]
    activation: str
    depth: int
    has_momentum: bool
    entered: bool  # the first chunk was begun by an earlier call
    ends_inside: bool  # the last chunk is not full
    starts: Tensor | None  # [batch, L] bool
    surprises: list[Tensor] | None

    def layers(self) -> list[int]:
        """Lengths of the lists in the Function's state arguments: W, S, anchor, document W, document S."""
        momentum = self.depth if self.has_momentum else 0
        documents = self.starts is not None
        return [self.depth, momentum, self.depth * self.entered, self.depth * documents, momentum * documents]


def _split(items: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    iterator = iter(items)
    return [[next(iterator) for _ in range(size)] for size in sizes]


def _flatten(
    spec: Spec, tensors: tuple[Tensor | None, ...]
) -> tuple[Sequence, list[Tensor], list[Tensor], list[Tensor]]:
    """The call with flattened rows, and the carried weights, momentum and anchor."""
    q, k, v, alpha, eta, theta, gain, bias, *states = tensors
    assert q is not None and k is not None and v is not None and theta is not None
    batch, heads = q.shape[:2]

    def flat(x: Tensor) -> Tensor:
        return x.flatten(0, 1).contiguous()

    norm = None
    if gain is not None and bias is not None:
        norm = Norm(gain.repeat(batch, 1)[:, None], bias.repeat(batch, 1)[:, None])
    weights, momentum, anchor, *document = _split([flat(s) for s in states if s is not None], spec.layers())
    starts = None if spec.starts is None else spec.starts.repeat_interleave(heads, dim=0)
    keep = torch.ones_like(flat(theta)) if alpha is None else 1 - flat(alpha)
    eta = None if eta is None else flat(eta)
    seq = Sequence(
        flat(q), flat(k), flat(v), keep, eta, flat(theta), ACTIVATIONS[spec.activation], norm, starts, *document
    )
    return seq, weights, momentum, anchor


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        seq, weights, momentum, anchor = _flatten(spec, tensors)
        walk = Walk(seq, weights, momentum, anchor if spec.entered else None).copied()
        y, stored = torch.empty_like(seq.v), []
        for segment in spec.grid:
            stored += sum(walk.copy(), [])
            _, _, coef = seq.coefficients(segment)
            walk.outputs(segment, coef, y, spec.surprises)
        # The first segment's state is an input; it is kept in its flat form, for one reading path.
        ctx.spec = spec
        ctx.save_for_backward(*tensors, *stored)
        ends = walk.last_anchor if spec.ends_inside else []
        rows = tensors[0].shape[:2]  # type: ignore[union-attr]
        return tuple(x.unflatten(0, rows) for x in (y, *walk.weights, *walk.momentum, *ends))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_final: Tensor) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        inputs = 8 + sum(spec.layers())
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no second time
        tensors, stored = saved[:inputs], list(saved[inputs:])
        return (None, *_Backward(spec, tensors, stored, d_y, d_final).gradients())


class _Backward:
    """One backward pass of the scan; its fields are the gradients that grow from the last token to the first."""

    def __init__(
        self,
        spec: Spec,
        tensors: tuple[Tensor | None, ...],
        stored: list[Tensor],
        d_y: Tensor,
        d_final: tuple[Tensor, ...],
    ) -> None:
        self.spec, self.tensors = spec, tensors
        self.seq, _, _, self.entered_anchor = _flatten(spec, tensors)
        depth, momentum = spec.layers()[:2]
        self.stored = _split(stored, [depth, momentum] * len(spec.grid))
        self.d_y = d_y.flatten(0, 1).contiguous()
        weights, moment, self.d_end_anchor = _split(
            [d.flatten(0, 1).clone() for d in d_final], [depth, momentum, depth * spec.ends_inside]
        )
        self.adj = Adjoints(weights, moment, weights)
        self.d_q, self.d_k, self.d_v = (torch.empty_like(x) for x in (self.seq.q, self.seq.k, self.seq.v))
        self.d_keep, self.d_theta = torch.empty_like(self.seq.keep), torch.empty_like(self.seq.theta)
        self.d_eta = None if self.seq.eta is None else torch.empty_like(self.seq.eta)
        norm = self.seq.norm
        self.d_gain: Tensor | None = None if norm is None else torch.zeros_like(norm.gain)
        self.d_bias: Tensor | None = None if norm is None else torch.zeros_like(norm.bias)
        self.d_document = [torch.zeros_like(x) for x in (*self.seq.document_weights, *self.seq.document_momentum)]
        self.d_entered: list[Tensor] = []

    def gradients(self) -> list[Tensor | None]:
        for index in range(len(self.spec.grid) - 1, -1, -1):
            self._segment(index)
        q = self.tensors[0]
        assert q is not None
        batch, heads = q.shape[:2]

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, (batch, heads))

        d_alpha = None if self.tensors[3] is None else -self.d_keep
        tokens = [self.d_q, self.d_k, self.d_v, d_alpha, self.d_eta, self.d_theta]
        norm = [None if g is None else g.view(batch, heads, -1).sum(0) for g in (self.d_gain, self.d_bias)]
        states = [*self.adj.weights, *self.adj.momentum, *self.d_entered, *self.d_document]
        return [*map(rows, tokens), *norm, *map(rows, states)]

    def _segment(self, index: int) -> None:
        segment, seq = self.spec.grid[index], self.seq
        weights, momentum = self.stored[2 * index : 2 * index + 2]
        keep, eta, coef = seq.coefficients(segment)
        entered = index == 0 and self.spec.entered
        anchor = self.entered_anchor if entered else None
        states = Walk(seq, weights, momentum, anchor).copied().states(segment, coef)
        d_rows = torch.zeros_like(coef.weight_rows)
        d_last = torch.zeros_like(coef.weight_rows[0])
        for j, span in reversed(list(enumerate(segment.spans()))):
            run = Walk(seq, *states.pop(), anchor).chunk(span, coef.chunk(j))
            if entered:
                self.adj.anchor = [torch.zeros_like(w) for w in weights]
            gradients = chunk_backward(
                self.d_y[:, run.span], run.coefficients, run.anchor, run.weights, run.momentum,
                run.saved, seq.act, seq.norm, self.adj,
            )  # fmt: skip
            for d_anchor, d_end in zip(self.adj.anchor, self.d_end_anchor, strict=False):
                d_anchor += d_end  # the last chunk's anchor was also an output
            self.d_end_anchor = []
            self.d_q[:, run.span], self.d_k[:, run.span], self.d_v[:, run.span] = gradients.q, gradients.k, gradients.v
            d_rows[:, :, j], d_last[:, j] = gradients.weight_rows.transpose(0, 1), gradients.last_momentum_row
            if self.d_gain is not None and self.d_bias is not None:
                assert gradients.gain is not None and gradients.bias is not None
                self.d_gain += gradients.gain.sum(1, keepdim=True)
                self.d_bias += gradients.bias.sum(1, keepdim=True)
            if run.document_rows is not None:
                self._document(run.document_rows)
        d_keep, d_eta, d_theta = coefficients_backward(coef, d_rows, d_last, keep, eta)
        whole = slice(segment.start, segment.stop)
        self.d_keep[:, whole], self.d_theta[:, whole] = d_keep.flatten(1), d_theta.flatten(1)
        if self.d_eta is not None and d_eta is not None:
            self.d_eta[:, whole] = d_eta.flatten(1)
        if entered:
            self.d_entered, self.adj.anchor = self.adj.anchor, self.adj.weights

    def _document(self, rows: Tensor) -> None:
        """A document's first chunk took the document state: its adjoint goes there, none goes further back."""
        for total, adjoint in zip(self.d_document, (*self.adj.weights, *self.adj.momentum), strict=True):
            total += torch.where(rows, adjoint, 0)
            adjoint.masked_fill_(rows, 0)


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    activation: str = "silu",
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    document_starts: Tensor | None = None,
    document_state: MemoryState | None = None,
    store_every: int = 16,
    surprises: list[Tensor] | None = None,
) -> tuple[Tensor, MemoryState]:
    """Writes every token into the memory and reads it back (Titans paper, eq. 8-15; dual form per chunk).

    q, k, v: [batch, heads, length, d]. alpha (forgetting), eta (momentum), theta (step size):
    [batch, heads, length], the first two in [0, 1]; alpha None means no forgetting, eta None no momentum.
    state: weights and momentum before the first token, batch as q or 1; inside a chunk it carries its anchor.
    gain, bias: [heads, d]; given, the memory is M(k) = k + gain * LayerNorm(MLP(k)) + bias.
    document_starts: [batch, length] bool, true only where a chunk begins; there the row takes `document_state`.
    store_every: the backward keeps the state of every k-th chunk; changes speed and memory, not results.
    surprises: a list that receives [batch * heads, tokens] norms of the inner gradients, chunk by chunk.

    Returns y [batch, heads, length, d] in q's dtype, and the state after the last token. Arithmetic and
    states are float32, or float64 for float64 inputs. Errors: ValueError for shapes that do not fit.
    """
    _check(q, k, v, theta, state, chunk_size, document_starts, document_state, eta)
    batch, length = q.shape[0], q.shape[2]
    if length == 0:
        return v.clone(), state
    offset = (state.offset + length) % chunk_size
    spec = Spec(
        chunk_grid(length, chunk_size, state.offset, store_every), activation, len(state.weights), eta is not None,
        state.offset > 0, offset > 0, document_starts, surprises,
    )  # fmt: skip
    tensors: list[Tensor | None] = [q, k, v, alpha, eta, theta, gain, bias]
    for source in (state, document_state if document_starts is not None else None):
        if source is not None:
            source = source.expand(batch)
            tensors += [*source.weights, *(source.momentum if eta is not None else ())]
            tensors += source.anchor or ()
    dtype = torch.promote_types(torch.promote_types(q.dtype, torch.float32), state.weights[0].dtype)
    outputs = _Scan.apply(spec, *(None if t is None else t.to(dtype) for t in tensors))
    weights, momentum, anchor = _split(
        list(outputs[1:]), [spec.depth, spec.depth * (eta is not None), spec.depth * (offset > 0)]
    )
    return outputs[0].to(q.dtype), MemoryState(tuple(weights), tuple(momentum), tuple(anchor) or None, offset)


def _check(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, state: MemoryState, chunk_size: int,
    starts: Tensor | None, document_state: MemoryState | None, eta: Tensor | None,
) -> None:  # fmt: skip
    if not (q.shape == k.shape == v.shape and theta.shape == q.shape[:3]):
        raise ValueError(
            "q, k, v are [batch, heads, length, d] and gates [batch, heads, length]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, theta {tuple(theta.shape)}"
        )
    d = q.shape[-1]
    if state.weights[0].shape[-2] != d or state.weights[-1].shape[-1] != d:
        shapes = [tuple(w.shape) for w in state.weights]
        raise ValueError(f"the memory maps width {d} to width {d}; its weights have shapes {shapes}")
    if eta is not None and not state.momentum:
        raise ValueError("eta is given but the state has no momentum; start it with MemoryState.start(weights)")
    if not 0 <= state.offset < chunk_size:
        raise ValueError(f"the state is {state.offset} tokens inside a chunk, but chunk_size is {chunk_size}")
    if starts is None:
        return
    if document_state is None or document_state.offset:
        raise ValueError("document_starts needs a document_state at a chunk border (offset 0)")
    if starts.device.type == "cpu":
        grid = (torch.arange(starts.shape[1]) + state.offset) % chunk_size == 0
        wrong = (starts & ~grid).nonzero()
        if len(wrong):
            raise ValueError(
                f"a document starts at token {int(wrong[0, 1])} of row {int(wrong[0, 0])}, which is not a multiple of "
                f"chunk_size {chunk_size}; pad the previous document up to a chunk border"
            )
