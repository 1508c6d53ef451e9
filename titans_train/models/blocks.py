"""The blocks: transformer, LMM, MAG and MAL (MAC has a file of its own). Titans paper, section 4.

Every block is residual and pre-normalised: x + mixer(norm(x)), then x + feed_forward(norm(x)). Shapes: B batch,
L tokens, N = B L tokens of the residual stream, flat and batch major, D width, H heads of this device, d head width,
P persistent tokens. A mixer is one region (see parts.py): columns, then work per head on [B, L, ...], then rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_train.memory.layer import Inputs, MemoryLayerState, NeuralMemory, memory_sections
from titans_train.memory.learned import Learned
from titans_train.memory.peers.layer import PeerMemory
from titans_train.memory.state import MemoryState
from titans_train.models.attention import Attention, AttentionState, attention_sections
from titans_train.models.layers import (
    FeedForward,
    HeadNorm,
    RMSNorm,
    normed_times_silu,
    silu_normed,
    silu_normed_times,
)
from titans_train.models.neighbours import UNCUT, Neighbours
from titans_train.models.parts import Parts
from titans_train.shape import ModelShape


@dataclass(frozen=True)
class BlockState:
    """What a block carries from one call to the next; parts that a block lacks are None."""

    attention: AttentionState | None = None
    memory: MemoryLayerState | None = None


def output_std(shape: ModelShape) -> float:
    """Projections that write into the residual stream start smaller, by the number of them (GPT-2)."""
    return shape.initializer_std * (2 * shape.layers) ** -0.5


def by_row(given: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    """Tokens [N, n] -> [B, L, n]"""
    return {name: x.unflatten(0, (batch, -1)) for name, x in given.items()}


class MemoryBranch(nn.Module):
    """The neural memory behind its persistent tokens: [P | x], projected -> heads of x (and of P).

    Persistent tokens are a chunk of their own in front of every document. The state after them is a constant of the
    layer, computed once per forward and loaded wherever a document starts. They are not written again when a
    carried state continues.
    """

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        assert shape.memory is not None
        self.shows_persistent = shape.block == "mal"  # its attention sees the memory's output at persistent tokens
        self.memory = NeuralMemory(shape, parts) if shape.memory.rule == "titans" else PeerMemory(shape, parts)

    def after_persistent(self, persistent: Inputs | None) -> tuple[MemoryState, Tensor | None]:
        """Memory state [1, ...] after the persistent tokens, and their heads [1, P, H, d]."""
        start = self.memory.initial_memory()
        if persistent is None:
            return start, None
        tails = self.memory.empty_tails(persistent["memory_q"])
        heads, state = self.memory(persistent, MemoryLayerState(start, tails), record=False)
        return state.memory.at_border(), heads

    def forward(
        self,
        given: Inputs,
        state: MemoryLayerState | None,
        persistent: Inputs | None,
        document_starts: Tensor | None,
        across: Neighbours,
    ) -> tuple[Tensor, MemoryLayerState, Tensor | None]:
        """Heads [B, L, H, d], the state, and in MAL the heads of the persistent tokens [1, P, H, d]."""
        start, persistent_heads = None, None
        if state is None or document_starts is not None or (self.shows_persistent and persistent is not None):
            start, persistent_heads = self.after_persistent(persistent)
        if state is None:
            assert start is not None
            x = given["memory_q"]
            state = MemoryLayerState(start.expand(x.shape[0]), self.memory.empty_tails(x))
        heads, state = self.memory(given, state, document_starts, start, across)
        return heads, state, persistent_heads


class Block(nn.Module):
    """Common frame. Subclasses set up their mixer and define `mix`."""

    holds_parameters = False  # True: a sharded optimiser must gather all its parameters before its forward

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__()
        self.shape, self.across = shape, across
        width, eps = shape.width, shape.norm_eps
        self.norm = RMSNorm(width, eps, parts)
        self.feed_forward_norm = RMSNorm(width, eps, parts)
        self.feed_forward = FeedForward(shape, output_std(shape), parts)
        count = shape.attention.persistent_tokens if shape.has_memory else 0
        self.persistent = Learned(parts.parameter(torch.randn(count, width), None)) if count else None

    def persistent_tokens(self) -> Tensor | None:
        """[P, D], in the normalised space of the mixer's input."""
        return None if self.persistent is None else self.persistent()[0]

    def fixed(self, columns: nn.Module, only: Sequence[str] | None = None) -> Inputs | None:
        """The persistent tokens projected as the mixer's input is, [1, P, n]; None where there are none."""
        persistent = self.persistent_tokens()
        return None if persistent is None else by_row(columns(persistent, "fixed", only), 1)

    def mix(
        self, x: Tensor, batch: int, state: BlockState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, batch: int, state: BlockState | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """x: the residual stream [N, D] (this device's share) of `batch` sequences; document_starts [B, L] bool."""
        x, state = self.mix(x, batch, state, document_starts)
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class TransformerBlock(Block):
    """Transformer++: RMSNorm, RoPE, SwiGLU."""

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__(shape, parts, across)
        self.project = parts.columns(shape.width, attention_sections(shape), shape.initializer_std)
        self.attention = Attention(shape, parts)
        self.out = parts.rows(shape.width, shape.width, output_std(shape))

    def mix(
        self, x: Tensor, batch: int, state: BlockState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        given = by_row(self.project(self.norm(x)), batch)
        heads, new = self.attention(given, state.attention if state else None, None, document_starts, self.across)
        return x + self.out(heads.flatten(2)), BlockState(attention=new)


class MemoryMixer(nn.Module):
    """Memory alone, finished: normalisation and a linear gate before the output projection (paper, section 4.4)."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        sections = {**memory_sections(shape), "gate": shape.width}
        self.project = parts.columns(shape.width, sections, shape.initializer_std)
        self.branch = MemoryBranch(shape, parts)
        self.head_norm = HeadNorm(shape, parts)
        self.out = parts.rows(shape.width, shape.width, output_std(shape))

    def gated(self, heads: Tensor, given: Inputs) -> Tensor:
        return self.head_norm(heads, given["gate"], function=normed_times_silu)

    def forward(
        self,
        x: Tensor,
        batch: int,
        state: MemoryLayerState | None,
        persistent: Inputs | None,
        document_starts: Tensor | None,
        across: Neighbours,
    ) -> tuple[Tensor, MemoryLayerState, Tensor | None]:
        """Output [N, D], the state, and the gated heads of the persistent tokens [1, P, H d]."""
        given = by_row(self.project(x), batch)
        heads, state, fixed = self.branch(given, state, persistent, document_starts, across)
        at_persistent = None if fixed is None or persistent is None else self.gated(fixed, persistent)
        return self.out(self.gated(heads, given)), state, at_persistent


class LMMBlock(Block):
    """The memory as the only sequence layer: o = M([P | x])."""

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__(shape, parts, across)
        self.mixer = MemoryMixer(shape, parts)

    def mix(
        self, x: Tensor, batch: int, state: BlockState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        carried, persistent = state.memory if state else None, self.fixed(self.mixer.project)
        y, new, _ = self.mixer(self.norm(x), batch, carried, persistent, document_starts, self.across)
        return x + y, BlockState(memory=new)


class Gating(nn.Module):
    """The paper's gate of two branches: both normalised with a vector scale, a non-linearity, the product. Per head.

    The non-linearity of the memory alone trains far better than that of both (README, "Does it remember?"), which lets
    little but positive values of either through.
    """

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        assert shape.memory is not None
        self.both = shape.memory.gate == "both"
        self.left = HeadNorm(shape, parts)
        self.right = HeadNorm(shape, parts)

    def forward(self, attended: Tensor, remembered: Tensor) -> Tensor:
        """[B, L, H, d] twice -> [B, L, H d]"""
        y = self.left(attended, function=silu_normed if self.both else None)
        return self.right(remembered, y, function=silu_normed_times)


class MAGBlock(Block):
    """Memory as gate: y = SWA([P | x]), o = y (x) M([P | x])."""

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__(shape, parts, across)
        sections = attention_sections(shape) | memory_sections(shape)
        self.project = parts.columns(shape.width, sections, shape.initializer_std)
        self.attention = Attention(shape, parts)
        self.branch = MemoryBranch(shape, parts)
        self.gating = Gating(shape, parts)
        self.out = parts.rows(shape.width, shape.width, output_std(shape))

    def mix(
        self, x: Tensor, batch: int, state: BlockState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        given, persistent = by_row(self.project(self.norm(x)), batch), self.fixed(self.project)
        before = BlockState() if state is None else state
        attended, attention = self.attention(given, before.attention, persistent, document_starts, self.across)
        remembered, memory, _ = self.branch(given, before.memory, persistent, document_starts, self.across)
        return x + self.out(self.gating(attended, remembered)), BlockState(attention, memory)


class MALBlock(Block):
    """Memory as layer: o = SWA(M([P | x])), both residual; attention sees the memory's output at P as well."""

    def __init__(self, shape: ModelShape, parts: Parts, across: Neighbours = UNCUT) -> None:
        super().__init__(shape, parts, across)
        self.mixer = MemoryMixer(shape, parts)
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps, parts)
        self.project = parts.columns(shape.width, attention_sections(shape), shape.initializer_std)
        self.attention = Attention(shape, parts)
        self.out = parts.rows(shape.width, shape.width, output_std(shape))

    def mix(
        self, x: Tensor, batch: int, state: BlockState | None, document_starts: Tensor | None
    ) -> tuple[Tensor, BlockState]:
        before, persistent = BlockState() if state is None else state, self.fixed(self.mixer.project)
        y, memory, at_persistent = self.mixer(
            self.norm(x), batch, before.memory, persistent, document_starts, self.across
        )
        x, seen = x + y, None
        if at_persistent is not None:
            tokens = self.persistent_tokens() + self.mixer.out(at_persistent, "fixed")[0]
            seen = by_row(self.project(self.attention_norm(tokens), "fixed"), 1)
        given = by_row(self.project(self.attention_norm(x)), batch)
        heads, attention = self.attention(given, before.attention, seen, document_starts, self.across)
        return x + self.out(heads.flatten(2)), BlockState(attention, memory)
