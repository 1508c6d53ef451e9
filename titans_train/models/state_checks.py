"""Is what a file calls a state one that the model of this shape can go on from? Asked before anything computes with it.

Shapes: B rows, H heads, d head width, K taps of the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.state import MemoryState
from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.mac import MACState
from titans_train.models.tree import tensors_of
from titans_train.shape import ModelShape

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FARTHEST = 1 << 40  # position of a token

Size = int | None  # None: any


def problems(blocks: Any, shape: ModelShape) -> Iterator[str]:
    """What is wrong with the states of all blocks."""
    if not isinstance(blocks, tuple) or len(blocks) != shape.layers:
        yield f"the model has {shape.layers} blocks, the state is {_kind(blocks)}"
        return
    check = _Checks(shape)
    for number, block in enumerate(blocks):
        for problem in check.block(block):
            yield f"block {number}: {problem}"
            return
    if len(rows := {tensor.shape[0] for tensor in tensors_of(blocks)}) != 1 or 0 in rows:
        yield f"it is of {sorted(rows)} rows, expected one number"


def _kind(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"


class _Checks:
    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def block(self, block: Any) -> Iterator[str]:
        if self.shape.block == "mac":
            yield from self._mac(block)
        elif not isinstance(block, BlockState):
            yield f"it is {_kind(block)}, expected a BlockState"
        else:
            has = (block.attention is not None, block.memory is not None)
            if has != (self.shape.has_attention, self.shape.has_memory):
                yield f"it has attention, memory: {has}, a block {self.shape.block!r} has others"
                return
            yield from self._attention(block.attention) if block.attention is not None else ()
            yield from self._layer(block.memory) if block.memory is not None else ()

    def _attention(self, state: Any) -> Iterator[str]:
        if not isinstance(state, AttentionState):
            yield f"attention is {_kind(state)}"
            return
        window = self.shape.attention.window
        yield from self._keys(state.keys, "keys")
        count = state.keys.shape[2] if isinstance(state.keys, Tensor) and state.keys.dim() == 4 else None
        yield from self._keys(state.values, "values", count)
        yield from _tensor(state.valid, (None, count), "valid", (torch.bool,))
        yield from _number(state.position, _FARTHEST, "position")
        if window is not None and count is not None and count >= max(window, 1):
            yield f"{count} keys, a window of {window} keeps at most {window - 1}"

    def _mac(self, state: Any) -> Iterator[str]:
        if not isinstance(state, MACState):
            yield f"it is {_kind(state)}, expected a MACState"
            return
        yield from self._layer(state.memory)
        yield from _number(state.position, self.shape.attention.segment or 1, "position")
        if (state.read_memory is None) != (state.position == 0):
            yield f"at position {state.position} of a segment, its memory to read is {_kind(state.read_memory)}"
        if state.read_memory is not None:
            yield from self._memory(state.read_memory, "read_memory")
        yield from self._tail(state.read_tail, "read_tail")
        for name in ("context_keys", "context_values", "keys", "values"):
            yield from self._keys(getattr(state, name), name, state.position)

    def _keys(self, value: Any, name: str, count: Size = None) -> Iterator[str]:
        yield from _tensor(value, (None, self.shape.heads, count, self.shape.head_dim), name)

    def _tail(self, value: Any, name: str) -> Iterator[str]:
        assert self.shape.memory is not None
        yield from _tensor(value, (None, self.shape.memory.convolution - 1, self.shape.width), name)

    def _layer(self, state: Any) -> Iterator[str]:
        if not isinstance(state, MemoryLayerState) or not isinstance(state.tails, tuple) or len(state.tails) != 3:
            yield f"memory is {_kind(state)}, expected a MemoryLayerState with three tails"
            return
        yield from self._memory(state.memory, "memory")
        for number, tail in enumerate(state.tails):
            yield from self._tail(tail, f"tails.{number}")

    def _memory(self, state: Any, name: str) -> Iterator[str]:
        memory = self.shape.memory
        assert memory is not None
        if not isinstance(state, MemoryState):
            yield f"{name} is {_kind(state)}, expected a MemoryState"
            return
        yield from self._weights(state.weights, f"{name}.weights")
        if memory.momentum or state.momentum != ():
            yield from self._weights(state.momentum, f"{name}.momentum")
        yield from _number(state.offset, memory.chunk_size, f"{name}.offset")
        if state.anchor is not None:
            yield from self._weights(state.anchor, f"{name}.anchor")

    def _weights(self, values: Any, name: str) -> Iterator[str]:
        memory, width = self.shape.memory, self.shape.head_dim
        assert memory is not None
        sizes = [width, *[memory.hidden] * (memory.depth - 1), width]
        if not isinstance(values, tuple) or len(values) != memory.depth:
            yield f"{name} is {_kind(values)}, expected a tuple of {memory.depth}"
            return
        for number, (value, (d_in, d_out)) in enumerate(zip(values, pairwise(sizes), strict=True)):
            yield from _tensor(value, (None, self.shape.heads, d_in, d_out), f"{name}.{number}")


def _tensor(value: Any, sizes: tuple[Size, ...], name: str, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Iterator[str]:
    if not isinstance(value, Tensor):
        yield f"{name} is {_kind(value)}, expected a tensor"
        return
    fits = value.dim() == len(sizes) and all(b in (None, a) for a, b in zip(value.shape, sizes, strict=True))
    if not fits or value.dtype not in dtypes:
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        yield f"{name} is {value.dtype} {list(value.shape)}, expected {dtypes[0]} [{expected}]"


def _number(value: Any, limit: int, name: str) -> Iterator[str]:
    if type(value) is not int or not 0 <= value < limit:
        yield f"{name} is {str(value)[:40]!r}, expected a number from 0 to below {limit}"
