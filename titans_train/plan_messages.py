"""Which messages ranks exchange: how many and how long, by layer and direction. Pure functions.

Legend: T tensor-parallel ranks, N tokens of a micro-batch, D width, B sequences, C segment, P persistent tokens.
A collective's length is that of the whole tensor in bytes; in a ring each rank sends (T-1)/T of it, twice that in an
all-reduce. A "send" between sequence shards has the bytes that one rank sends, header included. The rules are those of
parallel/megatron_layers.py and parallel/shards.py; tests/distributed/test_cost.py counts what really runs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise, product

from titans_train import plan_counts as counts
from titans_train.placement import FLOAT32, Placement
from titans_train.shape import ModelShape

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")
HEADER = 5 * 8  # bytes before a message between shards: which it is
ALIGNMENT = 8  # bytes: its tensors begin at multiples
OUTSTANDING = 64  # messages to a side whose buffers are kept; the oldest is waited for before another is sent


@dataclass
class Messages:
    """Number and bytes of each kind of collective."""

    count: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, size: int, times: int = 1) -> None:
        if times:
            self.count[kind] += times
            self.bytes[kind] += times * size

    def __add__(self, other: Messages) -> Messages:
        return Messages(self.count + other.count, self.bytes + other.bytes)

    def __sub__(self, other: Messages) -> Messages:
        return Messages(self.count - other.count, self.bytes - other.bytes)

    def __mul__(self, times: int) -> Messages:
        return Messages(
            Counter({k: n * times for k, n in self.count.items()}),
            Counter({k: n * times for k, n in self.bytes.items()}),
        )

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        return ", ".join(f"{self.count[k]} {k.replace('_', '-')}" for k in KINDS if self.count[k]) or "none"


def layer(shape: ModelShape, at: Placement) -> dict[str, Messages]:
    """Of one layer and micro-batch: "forward", "backward", and "shared": gradients of parameters that all ranks have.

    "recomputed": what activation checkpointing adds to the backward, the forward's without the layer's last message
    (torch stops recomputing at the last tensor that it needs).
    """
    forward, backward, shared = Messages(), Messages(), Messages()
    if at.tensor == 1:
        return {"forward": forward, "backward": backward, "shared": shared, "recomputed": Messages()}
    stream = at.tokens * shape.width * at.item
    parameters = counts.block_parameters(shape)
    regions = parameters["norms"] // shape.width  # each begins with a norm of width D
    _region(forward, backward, stream, at.sequence_parallel, regions)
    if shape.block == "mac":
        segment = shape.attention.segment
        assert segment is not None
        lengths = [min(segment, at.length - first) for first in range(0, at.length, segment)]
        for rows, tokens in product(part_sizes(at.sequences, at.pieces), lengths):
            size = rows * tokens * shape.width * at.item
            forward.add("all_gather", size)  # the heads of what was read
            forward.add("all_reduce", size)  # the attention's output
            backward.add("reduce_scatter", size)
            backward.add("all_reduce", size)
    _fixed(shape, at, forward, backward)
    if at.sequence_parallel:
        shared.add("all_reduce", shape.width * at.item, regions)
        if parameters["persistent"]:
            shared.add("all_reduce", parameters["persistent"] * at.item)
    recomputed = forward + Messages()
    last = "reduce_scatter" if at.sequence_parallel else "all_reduce"
    recomputed.count[last] -= 1
    recomputed.bytes[last] -= stream
    return {"forward": forward, "backward": backward, "shared": shared, "recomputed": recomputed}


def _region(forward: Messages, backward: Messages, stream: int, sequence_parallel: bool, regions: int) -> None:
    if not sequence_parallel:
        forward.add("all_reduce", stream, regions)
        backward.add("all_reduce", stream, regions)
        return
    forward.add("all_gather", stream, regions)
    forward.add("reduce_scatter", stream, regions)
    backward.add("all_gather", stream, 2 * regions)  # of the output's gradient, and of the input for the weight's
    backward.add("reduce_scatter", stream, regions)


def _fixed(shape: ModelShape, at: Placement, forward: Messages, backward: Messages) -> None:
    """Persistent tokens enter each mixer; in MAL they leave the first one as well."""
    if not shape.has_memory or not shape.attention.persistent_tokens:
        return
    size = shape.attention.persistent_tokens * shape.width * at.item
    if shape.block == "mal":
        forward.add("all_reduce", size)
    if at.sequence_parallel:
        backward.add("all_reduce", size, 1 if shape.block == "mal" else 0)
    else:
        backward.add("all_reduce", size, 2 if shape.block == "mal" else 1)


def ends(shape: ModelShape, at: Placement) -> dict[str, Messages]:
    """Of one micro-batch outside the layers: embedding, last norm, head, cross-entropy (four float32 per token)."""
    forward, backward, shared = Messages(), Messages(), Messages()
    if at.tensor == 1:
        return {"forward": forward, "backward": backward, "shared": shared}
    stream = at.tokens * shape.width * at.item
    forward.add("all_reduce", at.tokens * FLOAT32)
    forward.add("all_reduce", at.tokens * FLOAT32 * 3)
    if at.sequence_parallel:
        forward.add("reduce_scatter", stream)  # out of the embedding
        forward.add("all_gather", stream)  # into the head
        backward.add("all_gather", stream, 2)
        backward.add("reduce_scatter", stream)
        shared.add("all_reduce", shape.width * at.item)
    else:
        forward.add("all_reduce", stream)
        backward.add("all_reduce", stream)
    return {"forward": forward, "backward": backward, "shared": shared}


def step(shape: ModelShape, at: Placement, shard: int = 0) -> Messages:
    """Of one rank and optimiser step, all layers and micro-batches. ZeRO's own are apart.

    Shared parameters are completed once for each wave; what goes between shards is not sent again to recompute.
    """
    shards = across(shape, at, shard)
    one, outside = layer(shape, at), ends(shape, at)
    again = one["recomputed"] if at.checkpointing else Messages()
    layers = (shards["forward"] + shards["backward"] + one["forward"] + one["backward"] + again) * shape.layers
    waves = (one["shared"] * shape.layers + outside["shared"]) * -(-at.accumulation // at.wave)
    return (layers + outside["forward"] + outside["backward"]) * at.accumulation + waves


def part_sizes(count: int, parts: int) -> list[int]:
    """`count` things in at most so many parts, as equal as can be, none empty."""
    parts = min(parts, count)
    return [b - a for a, b in pairwise(count * n // parts for n in range(parts + 1))]


def padded(size: int) -> int:
    """Bytes that a tensor takes within a message."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def reach(window: int | None, left: int, carries: bool) -> int:
    """Keys before a shard that its first token sees; `left`: tokens of the sequence before it."""
    if window is None:
        return left
    return window - 1 if carries else min(window - 1, left)


def across(shape: ModelShape, at: Placement, shard: int) -> dict[str, Messages]:
    """What a rank with this shard of a sequence sends, for one layer and micro-batch: "forward" to the right (the
    affine scan: to all), "backward" to the left."""
    out = {"forward": Messages(), "backward": Messages()}
    if at.shards == 1:
        return out
    own = shape.width // at.tensor * at.item  # bytes of a token's heads

    def add(direction: str, sizes: list[int]) -> None:
        there = shard + 1 < at.shards if direction == "forward" else shard > 0
        if there and any(sizes):
            out[direction].add("send", HEADER + sum(map(padded, sizes)))

    taps = shape.memory.convolution - 1 if shape.memory is not None else 0
    for direction, left in (("forward", shard + 1), ("backward", shard)):
        if shape.has_attention and shape.block != "mac":
            keys = at.sequences * reach(shape.attention.window, left * at.length, at.carries)
            valid = keys if direction == "forward" else 0  # which keys are of the last document: a byte each
            add(direction, [keys * own, keys * own, valid])
        if shape.memory is None:
            continue
        if shape.block == "mac":
            for rows in part_sizes(at.sequences, at.pieces):
                add(direction, [*_states(shape, at, rows * shape.heads // at.tensor), *[rows * taps * own] * 4])
            continue
        add(direction, [at.sequences * taps * own] * 3)
        heads = at.sequences * shape.heads // at.tensor
        if at.strategy == "affine":
            d, m = shape.head_dim, shape.head_dim * (1 + shape.memory.momentum)
            columns = m + d if direction == "forward" else d
            out[direction].add("all_gather", at.shards * heads * m * columns * FLOAT32)
            continue
        for rows in part_sizes(heads, at.pieces):
            add(direction, _states(shape, at, rows))
    return out


def _states(shape: ModelShape, at: Placement, rows: int) -> list[int]:
    """Bytes of the memory's weights and momentum, of so many sequences x heads."""
    assert shape.memory is not None
    return [rows * i * o * FLOAT32 for i, o in counts.memory_layers(shape)] * (1 + shape.memory.momentum)


def carried(shape: ModelShape, at: Placement) -> Messages:
    """What the last shard hands to the first at a step's end, with training.carry_state."""
    out = Messages()
    size = shape.layers * sum(padded(size * at.sequences) for size in _carried_sizes(shape, at))
    out.add("send", size, at.accumulation)
    return out


def carried_row_bytes(shape: ModelShape, at: Placement) -> int:
    """What one row carries into the next batch, all layers, on a rank: the memory's weights and momentum, the inputs of
    its convolutions (MAC: of one more), the keys and values of a window and which of them count."""
    return shape.layers * sum(_carried_sizes(shape, at))


def _carried_sizes(shape: ModelShape, at: Placement) -> list[int]:
    """Bytes of a layer's tensors, of one row."""
    own, sizes = shape.width // at.tensor * at.item, []
    if shape.memory is not None:
        sizes += _states(shape, at, shape.heads // at.tensor)
        sizes += [(shape.memory.convolution - 1) * own] * (4 if shape.block == "mac" else 3)
    if shape.has_attention and shape.block != "mac" and shape.attention.window is not None:
        keys = shape.attention.window - 1
        sizes += [keys * own, keys * own, keys]
    return sizes


def zero(parameter_bytes: int, stage: int, backwards: int) -> Messages:
    """Of one rank and step between the ranks that share weights: what DeepSpeed 0.19 sends, in whole tensors.

    Gradients once per step (stages 0 and 1) or per backward (2: all-reduce, 3: reduce-scatter); updated parameters
    once (1 and 2); in stage 3 parameters before a layer's forward and again before its backward. Counted are the
    bytes; in how many pieces follows from the buckets. Small messages (norms, flags) are left out.
    """
    out = Messages()
    times = backwards if stage >= 2 else 1
    out.add("reduce_scatter" if stage == 3 else "all_reduce", parameter_bytes, times)
    if stage:
        out.add("all_gather", parameter_bytes, 2 * backwards if stage == 3 else 1)
    return out
