"""Memory as context (Titans paper, section 4.1): segments of C tokens, each read, attended, written in turn.

    h = M_{s-1}(q(x_s))                     read only: the memory as the previous segment left it
    y = Attn([P | h | x_s]), rows of x_s    row i sees h_j and x_j only for j <= i
    o = y (x) M(x_s + y)                    x_s + y is written into the memory, and read back causally

The paper's formula has M(y) there, its text residual connections everywhere. With y alone (attention.residual false)
what a token is reaches the memory only as far as attention has learned to look at it, and that trains far worse
(README, "Does it remember?").

One columns layer serves x (the whole sequence at once), h and y, by different sections of it; what is linear in x + y
is the sum of both. Shapes: B batch, T tokens of (a piece of) a segment, H heads of this device, d head width, D width,
N = B L tokens of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_train.memory.convolution import document_positions
from titans_train.memory.layer import Inputs, MemoryLayerState, NeuralMemory, memory_sections
from titans_train.memory.state import MemoryState
from titans_train.models.attention import (
    Attention,
    Persistent,
    attention_sections,
    masked_attention,
    with_persistent,
)
from titans_train.models.blocks import Block, Gating, by_row, output_std
from titans_train.models.layers import HeadNorm, rotate
from titans_train.models.neighbours import UNCUT, Neighbours
from titans_train.models.parts import Parts
from titans_train.models.tree import join_rows, take_rows
from titans_train.shape import ModelShape


@dataclass(frozen=True)
class MACState:
    """The memory being written, the memory that the current segment reads, and the segment's keys so far."""

    memory: MemoryLayerState
    read_memory: MemoryState | None  # None at a segment's first token: there it is the memory itself
    read_tail: Tensor  # of the query convolution over x: [B, K - 1, H d]
    context_keys: Tensor  # of h: [B, H, t, d]
    context_values: Tensor
    keys: Tensor  # of x: [B, H, t, d]
    values: Tensor
    position: int  # tokens of the segment already seen

    def chain(self) -> tuple[Tensor, ...]:
        """What goes on from one segment to the next."""
        memory = self.memory.memory
        return (*memory.weights, *memory.momentum, *self.memory.tails, self.read_tail)

    def with_chain(self, chain: Sequence[Tensor]) -> MACState:
        """The same with the values of another `chain()`, at a segment's end."""
        if self.position:
            return self
        memory, depth = self.memory.memory, len(self.memory.memory.weights)
        count = depth + len(memory.momentum)
        new = MemoryState(tuple(chain[:depth]), tuple(chain[depth:count]))
        q, k, v, read = chain[count:]
        return replace(self, memory=MemoryLayerState(new, (q, k, v)), read_tail=read)


class MACBlock(Block):
    holds_parameters = True  # between receiving its chain and sending it on it must not wait for any

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__(shape, parts, across)
        assert shape.attention.segment is not None
        self.segment = shape.attention.segment
        sections = attention_sections(shape) | memory_sections(shape)
        self.memory_sections, self.residual = tuple(memory_sections(shape)), shape.attention.residual
        self.x_sections = None if self.residual else ("q", "k", "v", "memory_q")
        self.project = parts.columns(shape.width, sections, shape.initializer_std)
        self.attention = Attention(shape, parts)
        self.attention_out = parts.rows(shape.width, shape.width, shape.initializer_std)
        self.memory = NeuralMemory(shape, parts)
        self.read_norm = HeadNorm(shape, parts)
        self.gating = Gating(shape, parts)
        self.out = parts.rows(shape.width, shape.width, output_std(shape))

    def initial_state(self, x: Tensor, initial: MemoryState) -> MACState:
        state = self.memory.initial_state(x, initial)
        empty = x.new_zeros(x.shape[0], self.attention.heads, 0, self.attention.head_dim)
        return MACState(state, None, state.tails[0], empty, empty, empty, empty, 0)

    def mix(  # type: ignore[override]
        self, x: Tensor, batch: int, state: MACState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, MACState]:
        given = by_row(self.project(self.norm(x), "tokens", self.x_sections), batch)
        initial = self.memory.initial_memory() if state is None or document_starts is not None else None
        if state is None:
            assert initial is not None
            state = self.initial_state(given["q"], initial)
        fixed = self.attention.persistent(self.fixed(self.project, ("k", "v")))
        outputs, states = [], []
        for number, rows in enumerate(self.across.pieces(batch)):
            part = {name: value[rows] for name, value in given.items()}
            starts = None if document_starts is None else document_starts[rows]
            y, new = self._rows(part, take_rows(state, rows), fixed, starts, initial, number)
            outputs.append(y)
            states.append(new)
        return x + self.out(torch.cat(outputs)), join_rows(states)

    def _rows(
        self,
        given: Inputs,
        state: MACState,
        fixed: Persistent | None,
        starts: Tensor | None,
        initial: MemoryState | None,
        number: int,
    ) -> tuple[Tensor, MACState]:
        """All segments of some rows, [B, L, H d] -> [B, L, H d]: the memory's chain goes through them."""
        state = state.with_chain(self.across.receive("chain", state.chain(), number))
        outputs, sizes = [], self._sizes(given["q"].shape[1], state.position)
        # split at once: the gradient of a slice would be as long as the sequence, for every segment
        pieces = {name: value.split(sizes, 1) for name, value in given.items()}
        inside = None if starts is None else starts.split(sizes, 1)
        for n in range(len(sizes)):
            piece, start = {name: parts[n] for name, parts in pieces.items()}, None if inside is None else inside[n]
            y, state = self._piece(piece, state, fixed, start, initial, ends=n + 1 == len(sizes))
            outputs.append(y)
        return self.across.send("chain", torch.cat(outputs, 1), state.chain(), number), state

    def _sizes(self, length: int, position: int) -> list[int]:
        """Of the rest of a segment begun, whole ones, and what is left."""
        first = min(self.segment - position, length)
        whole, left = divmod(length - first, self.segment)
        return [size for size in (first, *[self.segment] * whole, left) if size]

    def _enter_segment(self, state: MACState, starts: Tensor | None, initial: MemoryState | None) -> MACState:
        """At a segment's first token: new documents take the initial memory, and the read memory moves on."""
        memory = state.memory.memory
        if starts is not None and initial is not None:
            memory = memory.replace_rows(starts[:, 0], initial)
        return replace(state, memory=replace(state.memory, memory=memory), read_memory=memory.at_border())

    def _piece(
        self,
        given: Inputs,
        state: MACState,
        fixed: Persistent | None,
        starts: Tensor | None,
        initial: MemoryState | None,
        ends: bool,
    ) -> tuple[Tensor, MACState]:
        """given: of x, [B, T, H d], all within one segment -> o [B, T, H d], not yet projected.

        Document starts are possible at the segment's first token only. ends: no tokens follow in this call.
        """
        if starts is not None:
            inside = starts if state.position else starts[:, 1:]
            if inside.device.type == "cpu" and bool(inside.any()):
                raise ValueError(f"in MAC a document starts at a multiple of the segment, {self.segment} tokens")
        if state.position == 0:
            state = self._enter_segment(state, starts, initial)
        assert state.read_memory is not None
        positions = document_positions(starts)
        read, read_tail = self.memory.read(given["memory_q"], state.read_memory, state.read_tail, positions)
        context = self.project(self.read_norm(read).flatten(2), "heads", ("k", "v"))
        state = self._add_keys(given, context, state)
        heads = self._attend(given, state, fixed)
        y = self.project(self.attention_out(heads.flatten(2), "whole"), "whole", self.memory_sections)
        if self.residual:
            y = {name: value + given[name] for name, value in y.items()}
        # The memory rows of new documents are in place already: here only the convolutions restart.
        remembered, memory = self.memory(y, state.memory, *self._restart(starts, state), ends=ends)
        position = (state.position + heads.shape[1]) % self.segment
        state = replace(state, memory=memory, read_tail=read_tail, position=position)
        return self.gating(heads, remembered), state if position else self._leave_segment(state)

    def _leave_segment(self, state: MACState) -> MACState:
        """At a segment's end its keys are done with, and the memory that it read."""
        empty = state.keys[:, :, :0]
        return replace(state, read_memory=None, context_keys=empty, context_values=empty, keys=empty, values=empty)

    def _restart(self, starts: Tensor | None, state: MACState) -> tuple[Tensor | None, MemoryState | None]:
        return (None, None) if starts is None else (starts, state.read_memory)

    def _add_keys(self, given: Inputs, context: Inputs, state: MACState) -> MACState:
        """h_j and x_j both stand at position j of the segment."""
        a = self.attention

        def add(old: Tensor, new: Tensor) -> Tensor:
            return torch.cat([old.to(new.dtype), new], 2)

        def keys(of: Inputs) -> Tensor:
            return rotate(a.split(of["k"]), state.position, a.base, a.compile)

        return replace(
            state,
            context_keys=add(state.context_keys, keys(context)),
            context_values=add(state.context_values, a.split(context["v"])),
            keys=add(state.keys, keys(given)),
            values=add(state.values, a.split(given["v"])),
        )

    def _attend(self, given: Inputs, state: MACState, fixed: Persistent | None) -> Tensor:
        """Rows of x over [P | h | x], causal in both: heads [B, T, H, d]."""
        a, first = self.attention, state.position
        plain = a.split(given["q"])
        q = with_persistent(rotate(plain, first, a.base, a.compile), plain, fixed)
        index = torch.arange(first + plain.shape[2], device=q.device)
        causal = index <= index[first:, None]
        mask = torch.cat([causal, causal], 1)[None]
        keys = torch.cat([state.context_keys, state.keys], 2)
        values = torch.cat([state.context_values, state.values], 2)
        return masked_attention(q, keys, values, mask, fixed).transpose(1, 2)
