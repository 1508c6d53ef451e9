"""The blocks: transformer, LMM, MAG and MAL (MAC has a file of its own). Titans paper, section 4.

Every block is residual and pre-normalised: x + mixer(norm(x)), then x + feed_forward(norm(x)). Shapes: B batch,
L tokens, D width, H heads, d = D / H, P persistent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.memory.layer import MemoryLayerState, NeuralMemory
from titans_train.memory.learned import Learned
from titans_train.memory.state import MemoryState
from titans_train.models.attention import Attention, AttentionState
from titans_train.models.layers import FeedForward, HeadNorm, RMSNorm
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


class MemoryBranch(nn.Module):
    """The neural memory behind its persistent tokens: [P | x] -> heads of x (and of P).

    Persistent tokens are a chunk of their own in front of every document. The state after them is a constant of the
    layer, computed once per forward and loaded wherever a document starts. They are not written again when a
    carried state continues.
    """

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        self.memory = NeuralMemory(shape, parts)

    def after_persistent(self, persistent: Tensor | None) -> tuple[MemoryState, Tensor | None]:
        """Memory state [1, ...] after the persistent tokens [P, D], and their heads [1, P, H, d]."""
        start = self.memory.initial_memory()
        if persistent is None:
            return start, None
        tokens = persistent[None]
        heads, state = self.memory(tokens, MemoryLayerState(start, self.memory.empty_tails(tokens)))
        return state.memory.at_border(), heads

    def forward(
        self, x: Tensor, state: MemoryLayerState | None, persistent: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, MemoryLayerState, Tensor | None]:
        """Heads [B, L, H, d], the state, and the heads of the persistent tokens [1, P, H, d]."""
        start, persistent_heads = None, None
        if state is None or document_starts is not None or persistent is not None:
            start, persistent_heads = self.after_persistent(persistent)
        if state is None:
            state = self.memory.initial_state(x, start)
        heads, state = self.memory(x, state, document_starts, start)
        return heads, state, persistent_heads


class Block(nn.Module):
    """Common frame. Subclasses set up their mixer and define `mix`."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        self.shape = shape
        width, eps = shape.width, shape.norm_eps
        self.norm = RMSNorm(width, eps)
        self.feed_forward_norm = RMSNorm(width, eps)
        self.feed_forward = FeedForward(width, shape.feed_forward, shape.initializer_std, output_std(shape), parts)
        count = shape.attention.persistent_tokens if shape.has_memory else 0
        self.persistent = Learned(torch.randn(count, width)) if count else None

    def persistent_tokens(self) -> Tensor | None:
        """[P, D], in the normalised space of the mixer's input."""
        return None if self.persistent is None else self.persistent()[0]

    def mix(self, x: Tensor, state: BlockState | None, document_starts: Tensor | None) -> tuple[Tensor, BlockState]:
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: BlockState | None = None, document_starts: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        x, state = self.mix(x, state, document_starts)
        return x + self.feed_forward(self.feed_forward_norm(x)), state


class TransformerBlock(Block):
    """Transformer++: RMSNorm, RoPE, SwiGLU."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__(shape, parts)
        self.attention = Attention(shape, parts)
        self.out = parts.row_linear(shape.width, shape.width, output_std(shape))

    def mix(self, x: Tensor, state: BlockState | None, document_starts: Tensor | None) -> tuple[Tensor, BlockState]:
        h = self.norm(x)
        carried = state.attention if state and state.attention else self.attention.initial_state(h)
        heads, new = self.attention(h, carried, None, document_starts)
        return x + self.out(heads.flatten(2)), BlockState(attention=new)


class MemoryMixer(nn.Module):
    """Memory alone, finished: normalisation and a linear gate before the output projection (paper, section 4.4)."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        self.branch = MemoryBranch(shape, parts)
        self.head_norm = HeadNorm(shape.heads, shape.head_dim, shape.norm_eps)
        self.gate = parts.column_linear(shape.width, shape.width, shape.initializer_std)
        self.out = parts.row_linear(shape.width, shape.width, output_std(shape))

    def finish(self, heads: Tensor, x: Tensor) -> Tensor:
        return self.out(self.head_norm(heads).flatten(2) * F.silu(self.gate(x)))

    def forward(
        self, x: Tensor, state: MemoryLayerState | None, persistent: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, MemoryLayerState, Tensor | None]:
        """Output [B, L, D], the state, and the output at the persistent tokens [P, D]."""
        heads, state, fixed = self.branch(x, state, persistent, document_starts)
        at_persistent = None
        if fixed is not None and persistent is not None:
            at_persistent = self.finish(fixed, persistent[None])[0]
        return self.finish(heads, x), state, at_persistent


class LMMBlock(Block):
    """The memory as the only sequence layer: o = M([P | x])."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__(shape, parts)
        self.mixer = MemoryMixer(shape, parts)

    def mix(self, x: Tensor, state: BlockState | None, document_starts: Tensor | None) -> tuple[Tensor, BlockState]:
        carried = state.memory if state else None
        y, new, _ = self.mixer(self.norm(x), carried, self.persistent_tokens(), document_starts)
        return x + y, BlockState(memory=new)


class Gating(nn.Module):
    """The paper's gate of two branches: both normalised with a vector scale, a non-linearity, the product. Per head."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.left = HeadNorm(shape.heads, shape.head_dim, shape.norm_eps)
        self.right = HeadNorm(shape.heads, shape.head_dim, shape.norm_eps)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """[B, L, H, d] twice -> [B, L, D]"""
        return (F.silu(self.left(left)) * F.silu(self.right(right))).flatten(2)


class MAGBlock(Block):
    """Memory as gate: y = SWA([P | x]), o = y (x) M([P | x])."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__(shape, parts)
        self.attention = Attention(shape, parts)
        self.branch = MemoryBranch(shape, parts)
        self.gating = Gating(shape)
        self.out = parts.row_linear(shape.width, shape.width, output_std(shape))

    def mix(self, x: Tensor, state: BlockState | None, document_starts: Tensor | None) -> tuple[Tensor, BlockState]:
        h, persistent = self.norm(x), self.persistent_tokens()
        carried = state.attention if state and state.attention else self.attention.initial_state(h)
        attended, attention = self.attention(h, carried, persistent, document_starts)
        remembered, memory, _ = self.branch(h, state.memory if state else None, persistent, document_starts)
        return x + self.out(self.gating(attended, remembered)), BlockState(attention, memory)


class MALBlock(Block):
    """Memory as layer: o = SWA(M([P | x])), both residual; attention sees the memory's output at P as well."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__(shape, parts)
        self.mixer = MemoryMixer(shape, parts)
        self.attention_norm = RMSNorm(shape.width, shape.norm_eps)
        self.attention = Attention(shape, parts)
        self.out = parts.row_linear(shape.width, shape.width, output_std(shape))

    def mix(self, x: Tensor, state: BlockState | None, document_starts: Tensor | None) -> tuple[Tensor, BlockState]:
        persistent = self.persistent_tokens()
        y, memory, at_persistent = self.mixer(
            self.norm(x), state.memory if state else None, persistent, document_starts
        )
        x = x + y
        if persistent is not None and at_persistent is not None:
            persistent = self.attention_norm(persistent + at_persistent)
        h = self.attention_norm(x)
        carried = state.attention if state and state.attention else self.attention.initial_state(h)
        heads, attention = self.attention(h, carried, persistent, document_starts)
        return x + self.out(heads.flatten(2)), BlockState(attention, memory)
