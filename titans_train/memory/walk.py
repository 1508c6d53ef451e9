"""Walking over the chunks of a sequence: the chunk grid, and running chunks forward from a state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from titans_train.memory.activation import Activation
from titans_train.memory.chunk import Norm, Saved, chunk_read, chunk_update_, inner_gradients
from titans_train.memory.gates import ChunkCoefficients, Coefficients

if TYPE_CHECKING:
    from titans_train.memory.kernels import Chosen


@dataclass(frozen=True)
class Segment:
    """`chunks` chunks of equal length `size`, from token `start`. The backward stores one state per segment."""

    start: int
    chunks: int
    size: int
    whole: bool = False  # they are full, and begin here

    @property
    def stop(self) -> int:
        return self.start + self.chunks * self.size

    def in_parts(self, tokens: int) -> tuple[Segment, int]:
        """Its chunks' parts of `tokens` each, and how many make a chunk."""
        per_chunk = self.size // tokens
        return Segment(self.start, self.chunks * per_chunk, tokens, self.whole), per_chunk

    def spans(self) -> list[slice]:
        return [slice(self.start + j * self.size, self.start + (j + 1) * self.size) for j in range(self.chunks)]


def chunk_grid(length: int, chunk_size: int, offset: int, store_every: int) -> list[Segment]:
    """The rest of an entered chunk, whole chunks in groups of `store_every`, a ragged last one."""
    grid, start = [], 0
    if offset:
        start = min(length, chunk_size - offset)
        grid.append(Segment(0, 1, start))
    while length - start >= chunk_size:
        count = min(store_every, (length - start) // chunk_size)
        grid.append(Segment(start, count, chunk_size, whole=True))
        start = grid[-1].stop
    if start < length:
        grid.append(Segment(start, 1, length - start))
    return grid


@dataclass
class Sequence:
    """One call's tensors with batch and heads flattened to n = batch * heads."""

    q: Tensor  # [n, L, d]
    k: Tensor
    v: Tensor
    keep: Tensor  # 1 - alpha: [n, L]
    eta: Tensor | None
    theta: Tensor
    act: Activation
    norm: Norm | None
    starts: Tensor | None  # [n, L] bool
    document_weights: list[Tensor]  # [n, d_in, d_out]; empty without document starts
    document_momentum: list[Tensor]
    base: list[Tensor]  # of all weights above it; empty: zero
    kernels: Chosen | None = None  # who does whole chunks; None: plain PyTorch

    def part(self, rows: slice) -> Sequence:
        """Some of the rows."""

        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows]

        norm = None if self.norm is None else Norm(self.norm.gain[rows], self.norm.bias[rows])
        return Sequence(
            self.q[rows], self.k[rows], self.v[rows], self.keep[rows], cut(self.eta), self.theta[rows], self.act, norm,
            cut(self.starts), [w[rows] for w in self.document_weights], [s[rows] for s in self.document_momentum],
            [w[rows] for w in self.base], self.kernels,
        )  # fmt: skip

    def gates(self, segment: Segment) -> tuple[Tensor, Tensor | None, Tensor]:
        """keep, eta and theta of the segment, [n, chunks, size]."""

        def cut(gate: Tensor) -> Tensor:
            return gate[:, segment.start : segment.stop].unflatten(1, (segment.chunks, segment.size))

        return cut(self.keep), None if self.eta is None else cut(self.eta), cut(self.theta)

    def document_rows(self, t: int) -> Tensor | None:
        """Rows [n, 1, 1] in which a document starts at token t; None if there are none (asked on a CPU only)."""
        if self.starts is None:
            return None
        rows = self.starts[:, t]
        if rows.device.type == "cpu" and not bool(rows.any()):
            return None
        return rows[:, None, None]


@dataclass
class SequenceGradients:
    """Of a `Sequence`, in its shapes. What belongs to tokens is filled segment by segment, the rest is added to."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    eta: Tensor | None
    theta: Tensor
    gain: Tensor | None
    bias: Tensor | None
    document: list[Tensor]  # of document weights, then momentum

    @classmethod
    def of(cls, seq: Sequence) -> SequenceGradients:
        q, k, v, keep, theta = (torch.empty_like(x) for x in (seq.q, seq.k, seq.v, seq.keep, seq.theta))
        eta = None if seq.eta is None else torch.empty_like(seq.eta)
        gain = None if seq.norm is None else torch.zeros_like(seq.norm.gain)
        bias = None if seq.norm is None else torch.zeros_like(seq.norm.bias)
        document = [torch.zeros_like(x) for x in (*seq.document_weights, *seq.document_momentum)]
        return cls(q, k, v, keep, eta, theta, gain, bias, document)

    def fill_gates(self, segment: Segment, keep: Tensor, eta: Tensor | None, theta: Tensor) -> None:
        """Each [n, chunks, size]."""
        whole = slice(segment.start, segment.stop)
        self.keep[:, whole], self.theta[:, whole] = keep.flatten(1), theta.flatten(1)
        if self.eta is not None and eta is not None:
            self.eta[:, whole] = eta.flatten(1)


@dataclass
class ChunkRun:
    """A chunk whose inner gradients are known, with what reading, updating and the backward need."""

    span: slice
    coefficients: ChunkCoefficients
    anchor: list[Tensor]
    weights: list[Tensor]
    momentum: list[Tensor]
    saved: Saved
    document_rows: Tensor | None

    def read(self, seq: Sequence) -> Tensor:
        q = seq.q[:, self.span]
        return chunk_read(q, self.weights, self.momentum, seq.base, self.coefficients, self.saved, seq.act, seq.norm)


class Walk:
    """Runs chunks forward from a state. `outputs` and `states` move on in place: begin them with `copied()`.

    `entered_anchor` is the anchor of a chunk that an earlier call began, or None at a chunk border.
    """

    def __init__(
        self, seq: Sequence, weights: list[Tensor], momentum: list[Tensor], entered_anchor: list[Tensor] | None
    ) -> None:
        self.seq = seq
        self.weights, self.momentum, self.entered_anchor = weights, momentum, entered_anchor
        self.last_anchor: list[Tensor] = []

    def copied(self) -> Walk:
        self.weights, self.momentum = self.copy()
        return self

    def copy(self) -> tuple[list[Tensor], list[Tensor]]:
        """The current state, safe from what the walk does next."""
        return [w.clone() for w in self.weights], [s.clone() for s in self.momentum]

    def outputs(self, segment: Segment, coef: Coefficients, y: Tensor, surprises: list[Tensor] | None) -> None:
        """Writes and reads every chunk: fills y[:, segment], keeps the state and a single chunk's anchor."""
        for j, span in enumerate(segment.spans()):
            run = self._enter(span, coef.chunk(j))
            if segment.chunks == 1:
                self.last_anchor = [w.clone() for w in run.anchor]
            y[:, span] = run.read(self.seq)
            if surprises is not None:
                surprises.append(surprise(run.saved))
            self._update(run)

    def states(self, segment: Segment, coef: Coefficients) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Writes only: the state before each chunk of the segment."""
        states = [self.copy()]
        for j, span in enumerate(segment.spans()[:-1]):
            self._update(self._enter(span, coef.chunk(j)))
            states.append(self.copy())
        return states

    def _update(self, run: ChunkRun) -> None:
        chunk_update_(run.coefficients, run.weights, run.momentum, run.saved)
        self.weights, self.momentum = run.weights, run.momentum

    def chunk(self, span: slice, c: ChunkCoefficients) -> ChunkRun:
        """One chunk, written and read, for its backward; the state does not move on."""
        run = self._enter(span, c)
        run.read(self.seq)
        return run

    def _enter(self, span: slice, c: ChunkCoefficients) -> ChunkRun:
        """Takes document states where documents start, and the inner gradients at the chunk's anchor."""
        seq, rows = self.seq, self.seq.document_rows(span.start)
        weights, momentum = self.weights, self.momentum
        if rows is not None:
            weights = [torch.where(rows, d, w) for d, w in zip(seq.document_weights, weights, strict=True)]
            momentum = [torch.where(rows, d, s) for d, s in zip(seq.document_momentum, momentum, strict=True)]
        anchor, self.entered_anchor = self.entered_anchor, None
        if anchor is None:
            anchor = [b + w for b, w in zip(seq.base, weights, strict=True)] if seq.base else weights
        saved = inner_gradients(seq.k[:, span], seq.v[:, span], anchor, seq.act, seq.norm)
        return ChunkRun(span, c, anchor, weights, momentum, saved, rows)


def surprise(saved: Saved) -> Tensor:
    """Norm of each token's inner gradient over all layers, sqrt(sum_n |x_n|^2 |delta_n|^2): [n, T]."""
    squares = [x.square().sum(-1) * d.square().sum(-1) for x, d in zip(saved.inputs, saved.deltas, strict=True)]
    return torch.stack(squares).sum(0).sqrt()
