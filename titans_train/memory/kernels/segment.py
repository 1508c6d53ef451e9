"""Launches the kernels for a segment of whole chunks, in place of walk.Walk and rows.RowsBackward._segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_train.memory.activation import Gelu
from titans_train.memory.chunk import Adjoints
from titans_train.memory.gates import Coefficients
from titans_train.memory.kernels.backward import scan_backward
from titans_train.memory.kernels.coefficients import coefficients, coefficients_backward
from titans_train.memory.kernels.forward import scan_forward
from titans_train.memory.walk import Segment, Sequence, SequenceGradients
from titans_train.shape import part_tokens, tile, triton_tokens

# Of the hidden width: with 32 every backward keeps more numbers outside registers (1.15 to 4 times as many), and no
# forward fewer.
TILE = 16
# Of a thread, all that there are: left to itself ptxas uses 32 or 128 where not everything finds room, and puts
# thousands of bytes elsewhere (chunks of 32 with heads of 128).
REGISTERS = 255


@dataclass(frozen=True)
class States:
    """The state before each chunk of a segment: [rows, chunks, d_in, d_out] by layer."""

    weights: list[Tensor]
    momentum: list[Tensor]


def _layers(tensors: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """First (None at depth 1) and last layer."""
    if not tensors:
        return None, None
    return (tensors[0] if len(tensors) == 2 else None), tensors[-1]


def _pairs(weights: list[Tensor], momentum: list[Tensor]) -> list[Tensor | None]:
    """w1, s1, w2, s2"""
    (w1, w2), (s1, s2) = _layers(weights), _layers(momentum)
    return [w1, s1, w2, s2]


@dataclass(frozen=True)
class Launch:
    """One segment of a call, in parts, `per_chunk` to a chunk: a chunk, here and in the kernels, is a part."""

    seq: Sequence
    segment: Segment
    per_chunk: int
    keep: Tensor  # [rows, chunks, T]
    eta: Tensor | None
    coef: Coefficients
    precision: str  # of products: ieee, tf32 or tf32x3

    @classmethod
    def of(cls, seq: Sequence, segment: Segment, precision: str) -> Launch:
        most = triton_tokens(seq.k.shape[-1], precision == "ieee")
        parts, per_chunk = segment.in_parts(part_tokens(segment.size, most))
        keep, eta, theta = seq.gates(parts)
        with torch.cuda.device_of(seq.q):  # Triton launches on the current device
            return cls(seq, parts, per_chunk, keep, eta, coefficients(keep, eta, theta), precision)

    def sizes(self, weights: list[Tensor]) -> tuple[int, ...]:
        rows, length, d = self.seq.k.shape
        segment, hidden = self.segment, weights[-1].shape[-2]
        return length, segment.start, segment.chunks, rows, self.per_chunk, segment.size, d, hidden

    def anchors(self, weights: list[Tensor], make: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Of chunks of several parts, made as the weights are."""
        return _layers([make(w) for w in weights] if self.per_chunk > 1 else [])

    def options(self, weights: list[Tensor], momentum: list[Tensor]) -> dict[str, Any]:
        d, h = weights[-1].shape[-1], weights[-1].shape[-2]
        return {
            "BLOCK_T": tile(self.segment.size), "BLOCK_D": tile(d), "BLOCK_H": min(TILE, tile(h)),
            "DEEP": len(weights) == 2, "MOMENTUM": bool(momentum), "NORM": self.seq.norm is not None,
            "GELU": isinstance(self.seq.act, Gelu), "DOCUMENTS": self.seq.starts is not None,
            "PRECISION": self.precision, "num_warps": 8, "num_stages": 1, "maxnreg": REGISTERS,
        }  # fmt: skip

    def norm(self) -> list[Tensor | None]:
        norm = self.seq.norm
        return [None, None] if norm is None else [norm.gain.contiguous(), norm.bias.contiguous()]

    def documents(self) -> list[Tensor | None]:
        seq = self.seq
        if seq.starts is None:
            return [None] * 5
        return [seq.starts, *_pairs(seq.document_weights, seq.document_momentum)]

    def last_row(self) -> Tensor:
        return self.coef.momentum_rows[-1]

    def forward(
        self, weights: list[Tensor], momentum: list[Tensor], y: Tensor, surprises: list[Tensor] | None = None
    ) -> None:
        assert surprises is None
        self._forward(weights, momentum, y, keep=False)

    def _forward(self, weights: list[Tensor], momentum: list[Tensor], y: Tensor | None, keep: bool) -> States:
        """y None: only moves the state; keep: gives the states before chunks."""
        states = States([], [])
        if keep:
            n, chunks = weights[0].shape[0], self.segment.chunks
            states = States(*([w.new_empty(n, chunks, *w.shape[1:]) for w in each] for each in (weights, momentum)))
        seq = self.seq
        with torch.cuda.device_of(seq.q):
            scan_forward[(seq.k.shape[0],)](
                seq.q, seq.k, seq.v, y, self.coef.weight_rows, self.last_row(), *_pairs(weights, momentum),
                *self.norm(), *self.documents(), *_pairs(states.weights, states.momentum),
                *self.anchors(weights, torch.empty_like), *self.sizes(weights), **self.options(weights, momentum),
                READ=y is not None, KEEP=keep,
            )  # fmt: skip
        return states

    def backward(
        self,
        weights: list[Tensor],
        momentum: list[Tensor],
        d_y: Tensor,
        adjoints: Callable[[], Adjoints],
        found: SequenceGradients,
    ) -> None:
        states = self._forward([w.clone() for w in weights], [s.clone() for s in momentum], None, keep=True)
        adj = adjoints()
        d_weights, d_momentum = adj.weights, adj.momentum
        seq, sizes = self.seq, self.sizes(d_weights)
        rows, size, width = seq.k.shape[0], self.segment.size, sizes[-1]
        working = [seq.k.new_empty(rows, size, width) for _ in range(6)]
        working += [seq.k.new_empty(rows, size, seq.k.shape[-1]) for _ in range(2)]
        documents = [torch.zeros_like(x) for x in (*seq.document_weights, *seq.document_momentum)]
        depth = len(d_weights)
        d_rows, d_last = torch.empty_like(self.coef.weight_rows), torch.zeros_like(self.last_row())
        norm = [None if x is None else torch.zeros_like(x) for x in self.norm()]
        starts, *_ = self.documents()
        with torch.cuda.device_of(seq.q):
            scan_backward[(rows,)](
                seq.q, seq.k, seq.v, d_y, self.coef.weight_rows, self.last_row(),
                *_pairs(states.weights, states.momentum), *self.norm(), starts, *_pairs(d_weights, d_momentum),
                *_pairs(documents[:depth], documents[depth:]), found.q, found.k, found.v,
                d_rows, d_last, *norm, *working, *self.anchors(d_weights, torch.zeros_like), *sizes,
                **self.options(d_weights, d_momentum),
            )  # fmt: skip
            gates = coefficients_backward(self.coef, d_rows, d_last, self.keep, self.eta)
        found.fill_gates(self.segment, *gates)
        for total, own in zip((found.gain, found.bias, *found.document), (*norm, *documents), strict=True):
            if total is not None and own is not None:
                total += own
