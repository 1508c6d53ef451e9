"""The scan on flattened rows (n = batch * heads): forward, and its backward, which recomputes.

The forward keeps the state of every `store_every`-th chunk only. The backward takes these segments from last
to first, recomputes a segment's chunks from its stored state, and walks them in reverse. Rows do not mix, so that a
caller may take some of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from titans_train.memory.chunk import Adjoints
from titans_train.memory.chunk_backward import chunk_backward
from titans_train.memory.gates import Coefficients, coefficients, coefficients_backward
from titans_train.memory.kernels import launch
from titans_train.memory.walk import Segment, Sequence, SequenceGradients, Walk

State = tuple[list[Tensor], list[Tensor], list[Tensor]]  # weights, momentum, and the anchor of a chunk not yet full


@dataclass
class Rows:
    """Tensors of one call of the scan on n rows: what goes in, without the outputs' adjoints."""

    seq: Sequence
    weights: list[Tensor]  # [n, d_in, d_out] per layer, before the first token
    momentum: list[Tensor]
    anchor: list[Tensor]  # of a first chunk that an earlier call began, else empty

    def part(self, rows: slice) -> Rows:
        """Some of the rows."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [t[rows] for t in tensors]

        return Rows(self.seq.part(rows), cut(self.weights), cut(self.momentum), cut(self.anchor))


@dataclass
class RowGradients:
    """Gradients of a `Rows`, in its shapes."""

    tokens: list[Tensor | None]  # of q, k, v, keep, eta, theta
    norm: list[Tensor | None]  # of gain and bias [n, 1, d]
    weights: list[Tensor]
    momentum: list[Tensor]
    anchor: list[Tensor]
    document: list[Tensor]  # of the document state: weights, then momentum
    base: list[Tensor]

    def leave_start(self) -> None:
        """Where the start was another's, it has no gradient here."""
        for gradient in (*self.weights, *self.momentum):
            gradient.zero_()

    @classmethod
    def join(cls, parts: list[RowGradients]) -> RowGradients:
        """The gradients of all rows from those of neighbouring parts."""
        if len(parts) == 1:
            return parts[0]

        def of(name: str) -> Any:
            lists = zip(*(getattr(part, name) for part in parts), strict=True)
            return [None if same[0] is None else torch.cat(same) for same in lists]

        return cls(**{field.name: of(field.name) for field in fields(cls)})


def join_states(parts: list[State]) -> State:
    """The state of all rows from those of neighbouring parts."""
    if len(parts) == 1:
        return parts[0]
    weights, momentum, anchor = ([torch.cat(t) for t in zip(*same, strict=True)] for same in zip(*parts, strict=True))
    return weights, momentum, anchor


def forward_rows(
    rows: Rows, grid: list[Segment], y: Tensor, surprises: list[Tensor] | None = None
) -> tuple[State, list[Tensor]]:
    """Fills the outputs y [n, L, d]; returns the state after the last token, and the states for the backward."""
    seq, stored = rows.seq, []
    walk = Walk(seq, rows.weights, rows.momentum, rows.anchor or None).copied()
    for segment in grid:
        stored += sum(walk.copy(), [])
        if (kernel := launch(seq, segment, len(rows.weights), surprises is not None)) is not None:
            kernel.forward(walk.weights, walk.momentum, y, surprises)
        else:
            walk.outputs(segment, coefficients(*seq.gates(segment)), y, surprises)
    return (walk.weights, walk.momentum, walk.last_anchor), stored


class RowsBackward:
    """One backward pass; its fields are the gradients that grow from the last token to the first.

    d_end: asked for the gradients of the state after the last token (owned: they are changed) once they are needed,
    which is after the last segment has been recomputed. Its anchor is empty where that was no output.
    """

    def __init__(
        self, rows: Rows, grid: list[Segment], stored: list[Tensor], d_y: Tensor, d_end: Callable[[], State]
    ) -> None:
        self.rows, self.grid, self.d_y, self.d_end = rows, grid, d_y, d_end
        seq = rows.seq
        self.seq = seq
        each = len(rows.weights) + len(rows.momentum)
        self.stored = [stored[i * each : (i + 1) * each] for i in range(len(grid))]
        self.adj: Adjoints | None = None
        self.d_end_anchor: list[Tensor] = []
        self.found = SequenceGradients.of(seq)
        self.d_entered: list[Tensor] = []

    def gradients(self) -> RowGradients:
        for index in range(len(self.grid) - 1, -1, -1):
            self._segment(index)
        assert self.adj is not None
        adj, of = self.adj, self.found
        tokens = [of.q, of.k, of.v, of.keep, of.eta, of.theta]
        return RowGradients(
            tokens, [of.gain, of.bias], adj.weights, adj.momentum, self.d_entered, of.document, adj.base
        )

    def _adjoints(self) -> Adjoints:
        if self.adj is None:
            weights, momentum, self.d_end_anchor = self.d_end()
            self.adj = Adjoints(weights, momentum, weights, [torch.zeros_like(b) for b in self.seq.base])
        return self.adj

    def _segment(self, index: int) -> None:
        segment, seq = self.grid[index], self.seq
        depth = len(self.rows.weights)
        weights, momentum = self.stored[index][:depth], self.stored[index][depth:]
        if (kernel := launch(seq, segment, depth)) is not None:
            kernel.backward(weights, momentum, self.d_y, self._adjoints, self.found)
            return
        keep, eta, theta = seq.gates(segment)
        coef = coefficients(keep, eta, theta)
        d_rows = self._by_chunks(index, coef, weights, momentum)
        self.found.fill_gates(segment, *coefficients_backward(coef, *d_rows, keep, eta))

    def _by_chunks(
        self, index: int, coef: Coefficients, weights: list[Tensor], momentum: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the coefficients, and what they come with, chunk by chunk."""
        segment, seq, found = self.grid[index], self.seq, self.found
        anchor = (self.rows.anchor or None) if index == 0 else None
        states = Walk(seq, weights, momentum, anchor).copied().states(segment, coef)
        d_rows = torch.zeros_like(coef.weight_rows)
        d_last = torch.zeros_like(coef.weight_rows[0])
        for j, span in reversed(list(enumerate(segment.spans()))):
            run = Walk(seq, *states.pop(), anchor).chunk(span, coef.chunk(j))
            adj = self._adjoints()
            if anchor is not None or seq.base:
                adj.anchor = [torch.zeros_like(w) for w in weights]
            gradients = chunk_backward(
                self.d_y[:, run.span], run.coefficients, run.anchor, run.weights, run.momentum, seq.base,
                run.saved, seq.act, seq.norm, adj,
            )  # fmt: skip
            for d_anchor, d_end in zip(adj.anchor, self.d_end_anchor, strict=False):
                d_anchor += d_end  # the last chunk's anchor was also an output
            self.d_end_anchor = []
            if seq.base and anchor is None:
                for total in (adj.weights, adj.base):  # the anchor was base + weights
                    for d_part, d_anchor in zip(total, adj.anchor, strict=True):
                        d_part += d_anchor
                adj.anchor = adj.weights
            found.q[:, run.span], found.k[:, run.span], found.v[:, run.span] = gradients.q, gradients.k, gradients.v
            d_rows[:, :, j], d_last[:, j] = gradients.weight_rows.transpose(0, 1), gradients.last_momentum_row
            if found.gain is not None and found.bias is not None:
                assert gradients.gain is not None and gradients.bias is not None
                found.gain += gradients.gain.sum(1, keepdim=True)
                found.bias += gradients.bias.sum(1, keepdim=True)
            if run.document_rows is not None:
                self._document(run.document_rows, adj)
        if anchor is not None:
            self.d_entered, adj.anchor = adj.anchor, adj.weights
        return d_rows, d_last

    def _document(self, starting: Tensor, adj: Adjoints) -> None:
        """A document's first chunk took the document state: its adjoint goes there, none goes further back."""
        for total, adjoint in zip(self.found.document, (*adj.weights, *adj.momentum), strict=True):
            total += torch.where(starting, adjoint, 0)
            adjoint.masked_fill_(starting, 0)
