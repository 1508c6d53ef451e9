"""Many texts continued side by side: one forward per token for all rows that can stand in one batch.

Rows have read texts of different lengths, a model's state counts their tokens, and a batch has one count. Three exact
changes make one of many:

* attention: cached keys are turned back so that every row's next token is at position 0 (RoPE is relative), and
  shorter caches get places in front that no query sees;
* memory: a chunk's gradients are taken at its first weights, the anchor. Each row carries its own, so rows may be at
  different places in a chunk: after each token, those whose chunk is full take their weights as the next anchor;
* MAC: a segment's keys are at positions of the segment, so only rows at the same place in one stand together.

What a row gets is what it gets alone, but for rounding: 1e-10 in float64; in float32 the likeliest token of two that
are all but equally likely may be the other. Only decoding is done in one batch, and prompts of one length are read in
one (sampling.read_rows): prompts of different lengths are read one after the other.

Shapes: B rows, H heads, C cached keys, d head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.inference.sampler import Sampler
from titans_train.inference.sampling import Reading
from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.state import MemoryState
from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.mac import MACState
from titans_train.models.state import ModelState
from titans_train.models.tree import join_rows, map_tensors
from titans_train.shape import ModelShape


@torch.inference_mode()
def generate_rows(
    model: Any, readings: Sequence[Reading], count: int, sampler: Sampler,
    generators: Sequence[torch.Generator], take: Callable[[int, int], bool],
) -> list[Reading]:  # fmt: skip
    """Continues every reading by at most `count` tokens, as `generate` would each alone with its own generator.

    take(row, token) is told each token as it is drawn, and says whether the row goes on. Returns each row's reading
    after its last token.
    """
    last = list(readings)
    for numbers in groups(readings):
        rows = Rows(model, [readings[n] for n in numbers])
        for _ in range(count):
            tokens = sampler.draw_rows(rows.logits.cpu(), [generators[n] for n in numbers], rows.seen_on_cpu())
            rows.step(tokens)
            going = [place for place, token in enumerate(tokens) if take(numbers[place], token)]
            if len(going) < len(numbers):
                for place in set(range(len(numbers))) - set(going):
                    last[numbers[place]] = rows.reading(place)
                numbers = [numbers[place] for place in going]
                rows.keep(going)
            if not numbers:
                break
        for place, number in enumerate(numbers):
            last[number] = rows.reading(place) if count else readings[number]
    return last


def groups(readings: Sequence[Reading]) -> list[list[int]]:
    """Numbers of the readings that can stand in one batch: all, but in MAC those at one place of their segments."""
    found: dict[int, list[int]] = {}
    for number, reading in enumerate(readings):
        block = reading.state.blocks[0]
        found.setdefault(block.position if isinstance(block, MACState) else 0, []).append(number)
    return list(found.values())


class Rows:
    """Texts in one batch, each wherever it is in its chunk."""

    def __init__(self, model: Any, readings: Sequence[Reading]) -> None:
        """readings: of one of `groups`."""
        self.model, shape = model, model.shape
        self.logits = torch.stack([reading.logits for reading in readings])  # [B, V], of the next token
        seen = [reading.seen for reading in readings if reading.seen is not None]
        self.seen = torch.stack(seen) if len(seen) == len(readings) else None  # [B, V]
        free = not isinstance(readings[0].state.blocks[0], MACState)
        self.chunk = shape.memory.chunk_size if free and _anchored(shape) else None
        self.offsets = [_offset(reading.state) for reading in readings]  # tokens of its chunk that a row has written
        if free:
            longest = max(_cached(reading.state) for reading in readings)
            self.state = join_rows([_freed(reading.state, shape, longest) for reading in readings])
        else:
            self.state = join_rows([reading.state for reading in readings])

    def step(self, tokens: Sequence[int]) -> None:
        """Every row's text goes on by one token."""
        column = torch.tensor(tokens, device=self.logits.device)[:, None]
        output = self.model(column, state=self.state, return_state=True)
        before, self.state, self.logits = self.state, output.state, output.logits[:, -1]
        if self.seen is not None:
            self.seen = self.seen.scatter(1, column, True)
        if self.chunk is not None:
            self.offsets = [(offset + 1) % self.chunk for offset in self.offsets]
            self.state = self._anchored_again(before)

    def _anchored_again(self, before: ModelState) -> ModelState:
        """Rows at the end of a chunk take their weights as anchor; the others keep the one they had."""
        full = torch.tensor([offset == 0 for offset in self.offsets], device=self.logits.device)[:, None, None, None]
        blocks = []
        for old, new in zip(before.blocks, self.state.blocks, strict=True):
            kept, memory = _memory(old), _memory(new)
            anchors = kept.weights if kept.anchor is None else kept.anchor
            moved = tuple(torch.where(full, w, a) for w, a in zip(memory.weights, anchors, strict=True))
            blocks.append(_with_memory(new, _inside(memory, moved, self.chunk)))
        return ModelState(tuple(blocks))

    def keep(self, places: Sequence[int]) -> None:
        """The rows at these places alone."""
        where = torch.tensor(places, dtype=torch.long, device=self.logits.device)
        self.state = map_tensors(lambda t: t[where], self.state)
        self.logits, self.offsets = self.logits[where], [self.offsets[place] for place in places]
        self.seen = None if self.seen is None else self.seen[where]

    def reading(self, place: int) -> Reading:
        """One row as it is alone: a state like any other, which can be saved."""
        state: ModelState = map_tensors(lambda t: t[place : place + 1], self.state)
        if self.chunk is not None:
            state = ModelState(tuple(self._placed(block, self.offsets[place]) for block in state.blocks))
        state = ModelState(tuple(_without_empty_places(block) for block in state.blocks))
        return Reading(state, self.logits[place], None if self.seen is None else self.seen[place])

    @staticmethod
    def _placed(block: Any, offset: int) -> BlockState:
        memory = block.memory.memory
        own = replace(memory, offset=offset) if offset else memory.at_border()
        return _with_memory(block, own)

    def seen_on_cpu(self) -> Tensor | None:
        return None if self.seen is None else self.seen.cpu()


def _anchored(shape: ModelShape) -> bool:
    """The memory's function depends on where chunks begin."""
    return shape.memory is not None and shape.memory.rule == "titans" and shape.memory.chunk_size > 1


def _memory(block: BlockState | MACState) -> MemoryState:
    assert block.memory is not None
    return block.memory.memory


def _offset(state: ModelState) -> int:
    return 0 if state.blocks[0].memory is None else _memory(state.blocks[0]).offset


def _cached(state: ModelState) -> int:
    block = state.blocks[0]
    return block.attention.keys.shape[2] if isinstance(block, BlockState) and block.attention is not None else 0


def _freed(state: ModelState, shape: ModelShape, longest: int) -> ModelState:
    """A row's state without its own counts; its attention has `longest` places."""
    blocks = []
    for block in state.blocks:
        assert isinstance(block, BlockState)
        if block.attention is not None:
            attention = _padded(block.attention.from_here(shape.attention.rope_base), longest)
            block = replace(block, attention=attention)
        if block.memory is not None and shape.memory is not None and _anchored(shape):
            memory = block.memory.memory
            anchor = memory.weights if memory.anchor is None else memory.anchor
            block = _with_memory(block, _inside(memory, anchor, shape.memory.chunk_size))
        blocks.append(block)
    return ModelState(tuple(blocks))


def _inside(memory: MemoryState, anchor: tuple[Tensor, ...], chunk: int | None) -> MemoryState:
    """At a place in a chunk that a further token belongs to, whichever: each token is a piece of its own."""
    assert chunk is not None and chunk > 1
    return MemoryState(memory.weights, memory.momentum, anchor, 1)


def _with_memory(block: Any, memory: MemoryState) -> BlockState:
    layer: MemoryLayerState = replace(block.memory, memory=memory)
    changed: BlockState = replace(block, memory=layer)
    return changed


def _padded(state: AttentionState, places: int) -> AttentionState:
    front = places - state.keys.shape[2]
    keys, values = (F.pad(t, (0, 0, front, 0)) for t in (state.keys, state.values))
    return AttentionState(keys, values, F.pad(state.valid, (front, 0), value=False), state.position)


def _without_empty_places(block: Any) -> Any:
    if not isinstance(block, BlockState) or block.attention is None:
        return block
    state = block.attention
    own = state.valid[0]
    return replace(
        block,
        attention=AttentionState(state.keys[:, :, own], state.values[:, :, own], state.valid[:, own], state.position),
    )
