"""How many bytes a rank needs at the peak of a step, by part. Pure functions; each states what it counts.

Legend: T tensor-parallel ranks, R ranks that ZeRO shards over, n parameters of a rank, D width, F feed-forward width,
V table rows, N tokens of a micro-batch. `benchmark layouts` measures the same peak in tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

from titans_train import plan_counts as counts
from titans_train import plan_messages as messages
from titans_train.placement import FLOAT32, Placement
from titans_train.shape import MemoryShape, ModelShape, part_tokens, triton_tokens

ZERO_STAGES = (0, 1, 2, 3)
PEER_KEPT = {  # counted from the tensors that memory/peers saves, chunks of 16 to 64 tokens, heads of 32 and 64
    "deltanet": (27.3, 8.0, 2.0), "gated_deltanet": (29.2, 12.2, 2.0), "mamba2": (15.1, 3.1, 1.0),
    "rwkv7": (47.1, 4.2, 2.0),
}  # fmt: skip


@dataclass(frozen=True)
class ZeroSizes:
    """Settings of DeepSpeed that decide memory, in numbers of parameters of a rank."""

    bucket: int  # gradients reduced at once
    live: int  # parameters that stage 3 holds whole at once


def zero_sizes(shape: ModelShape, at: Placement, stage: int) -> ZeroSizes:
    """Stages 0 and 1 reduce everything at once, at the end; 2 and 3 a layer (or the table) at a time.

    Over sequence shards stage 2 also waits for the end: a reduction in every layer would stop the wavefront. So does
    stage 3 with MAC, whose layers hand their state on between the uses of their parameters.
    """
    block = sum(counts.block_parameters(shape).values()) // at.tensor
    table = shape.padded_vocabulary * shape.width // at.tensor
    whole = counts.parameters_per_rank(shape, at.tensor)
    at_end = stage < 2 or (at.shards > 1 and (stage == 2 or shape.block == "mac"))
    return ZeroSizes(whole if at_end else min(whole, max(block, table)), min(whole, 2 * block + table))


def memory(shape: ModelShape, at: Placement, stage: int) -> dict[str, int]:
    """Bytes by part at the peak of a step, and "total".

    With a single backward per step gradients come as activations go: counted is what is more than these.
    """
    n = counts.parameters_per_rank(shape, at.tensor)
    sizes = zero_sizes(shape, at, stage)
    states = zero_bytes(n, sizes, stage, at)
    parts = states | {
        "activations": activation_bytes(shape, at),
        "scan_states": scan_state_bytes(shape, at),
        "working": working_bytes(shape, at),
        "shards": shard_bytes(shape, at),
        "carried": messages.carried_row_bytes(shape, at) * at.sequences * at.accumulation if at.carries else 0,
    }
    if at.accumulation == at.wave:
        going = parts["activations"] + parts["scan_states"] + parts["working"]
        parts["gradients"] = max(0, parts["gradients"] - going)
    return {**parts, "total": sum(parts.values())}


def zero_bytes(n: int, sizes: ZeroSizes, stage: int, at: Placement) -> dict[str, int]:
    """What training holds beside activations: stage 1 splits moments and float32 master weights over R ranks, 2 also
    the gradients, 3 also the parameters.

    Master weights exist for bfloat16; for float32 in DeepSpeed's stages 1 to 3 as well (its flat copy of the
    partition). Gradients in stages 0 and 1 are whole while micro-batches accumulate. Buffers: the bucket that
    gradients are reduced in; in stage 3 also the parameters that are whole in turn.
    """
    part = -(-n // at.replicas)
    own = part if stage else n
    gathered = sizes.live if at.replicas > 1 else 0
    buffers = {0: 0, 1: sizes.bucket, 2: sizes.bucket, 3: sizes.bucket + gathered}[stage]
    return {
        "parameters": at.item * (part if stage == 3 else n),
        "gradients": at.item * (part if stage >= 2 else n),
        "master_weights": FLOAT32 * own if stage or at.item < FLOAT32 else 0,
        "optimizer": 2 * FLOAT32 * own,
        "buffers": at.item * buffers,
    }


def activation_bytes(shape: ModelShape, at: Placement) -> int:
    """What autograd keeps of a wave's micro-batches, apart from the scan's states.

    Per token and layer, in numbers, counted from the tensors that the layers save: of the residual stream 4 D (each of
    two norms keeps its input and its output; MAL has three); feed-forward 4 F, attention 8 D, 2 D more for the
    overlapping blocks of a window and a mask of one byte per key; the memory 20.5 D and 5 D float32 for the scan, 2
    D more for MAG's gate; MAC's segments 45 D, and in float32 7 D and 2 hidden units of the memory. Outside the
    layers: embedding and last norm 3 D, and the logits, V. With checkpointing: every layer's input, and
    one layer's tensors at a time.
    """
    layer, tokens, stream = layer_bytes(shape, at), at.tokens, at.stream_tokens
    ends = at.item * (3 * stream * shape.width + tokens * shape.padded_vocabulary / at.tensor)
    if at.checkpointing:
        return int(at.wave * (shape.layers * stream * shape.width * at.item + ends) + layer)
    return int(at.wave * (shape.layers * layer + ends))


def layer_bytes(shape: ModelShape, at: Placement) -> float:
    own = shape.width / at.tensor
    norms = counts.block_parameters(shape)["norms"]  # numbers in all norms of a layer: D each
    numbers = 4 * shape.feed_forward / at.tensor
    wide = 0.0
    if shape.block == "mac":
        assert shape.memory is not None
        numbers += 45 * own
        wide = 7 * own + 2 * (shape.heads // at.tensor) * shape.memory.hidden  # hidden units of what was read
    else:
        if shape.has_attention:
            numbers += (8 if shape.attention.window is None else 10) * own
        if shape.memory is not None and shape.memory.rule != "titans":
            numbers += 13 * own + sum(shape.peer_gates().values()) / at.tensor
            wide = peer_numbers(shape.memory, shape.head_dim) * own
        elif shape.has_memory:
            numbers += 20.5 * own
            wide = 5 * own
        if shape.block == "mag":
            numbers += 2 * own
    split = at.tokens * (at.item * numbers + FLOAT32 * wide + _mask_bytes(shape, at.length))
    return at.item * at.stream_tokens * 2 * norms + split


def peer_numbers(memory: MemoryShape, d: int) -> float:
    """What another paper's rule keeps in float32, in widths of its heads: by token, by T x T products, by states."""
    by_token, products, states = PEER_KEPT[memory.rule]
    return by_token + products * memory.chunk_size / d + states * d / memory.chunk_size


def _mask_bytes(shape: ModelShape, length: int) -> float:
    """Per token: a byte for each key that a block of queries reaches; in MAC float32 for two segments."""
    window = shape.attention.window
    if shape.block == "mac":
        return 2.0 * FLOAT32 * (shape.attention.segment or 0)
    if window is None or not shape.has_attention:
        return 0.0
    return min(window, length) + window - 1


def working_bytes(shape: ModelShape, at: Placement) -> int:
    """The most that a backward needs beside what it was given: at the head, or in the last layer's scan.

    Head: what was sent to other shards; the gradient of the logits. Scan: the states of the segment that it
    recomputes, two more of gradients, and 12 D numbers in float32 per token; what the last layer kept of what follows
    the scan (feed-forward, MAL's attention) is free then.
    """
    head = at.item * at.tokens * shape.padded_vocabulary // at.tensor + sent_bytes(shape, at)
    if shape.memory is None:
        return head
    own = shape.width / at.tensor
    free = at.item * (at.tokens * 4 * shape.feed_forward / at.tensor + at.stream_tokens * 2 * shape.width)
    if shape.block == "mal":
        free += at.item * (at.tokens * 10 * own + at.stream_tokens * 2 * shape.width)
    calls, chunks = _scans(shape, at.length)
    states = min(shape.memory.store_every, chunks) * _parts(shape, at) + 2
    scan = _state_bytes(shape, at) * states + 12 * FLOAT32 * own * at.tokens / calls
    return max(head, int(scan - free), 0)


def _parts(shape: ModelShape, at: Placement) -> int:
    """Of a chunk, before each of which Triton's kernels keep the state. (The compiled scan, for CPUs, too, but only of
    the rows that its threads are at.)
    """
    memory = shape.memory
    assert memory is not None
    if memory.kernels != "triton":
        return 1
    most = triton_tokens(shape.head_dim, exact=at.item == FLOAT32)
    return memory.chunk_size // part_tokens(memory.chunk_size, most)


def _scans(shape: ModelShape, length: int) -> tuple[int, int]:
    """Scans over a sequence (MAC: one per segment), and chunks in each."""
    assert shape.memory is not None
    if shape.block != "mac":
        return 1, -(-length // shape.memory.chunk_size)
    assert shape.attention.segment is not None
    return -(-length // shape.attention.segment), shape.attention.segment // shape.memory.chunk_size


def _state_bytes(shape: ModelShape, at: Placement) -> int:
    """Weights of a layer's memory, and momentum if any, float32, of a micro-batch's sequences."""
    assert shape.memory is not None
    return counts.fast_weights(shape) // at.tensor * (1 + shape.memory.momentum) * FLOAT32 * at.sequences


def scan_state_bytes(shape: ModelShape, at: Placement) -> int:
    """Memory states that the scans keep for their backward: every `store_every`-th chunk's, of each layer (of one
    layer at a time with checkpointing). MAC's segments keep the weights twice more, as read and as handed on.
    Once per layer, whatever the batch: the initial state, and two states of the persistent tokens' scan."""
    if shape.memory is None or shape.memory.rule != "titans":  # a peer's are among its layer's tensors
        return 0
    calls, chunks = _scans(shape, at.length)
    kept = calls * -(-chunks // shape.memory.store_every)
    again = 2 * counts.fast_weights(shape) // at.tensor * FLOAT32 * at.sequences * calls if shape.block == "mac" else 0
    persistent = 2 if shape.attention.persistent_tokens and shape.block != "mac" else 0
    once = _state_bytes(shape, at) // at.sequences * (1 + persistent)
    return (_state_bytes(shape, at) * kept + again + once) * (1 if at.checkpointing else shape.layers * at.wave)


def shard_bytes(shape: ModelShape, at: Placement) -> int:
    """What has come from other shards and is kept: keys and values of a window, beside a rank's own; with checkpointing
    all of it, which a repetition needs again. On the rank with most."""
    if at.shards == 1:
        return 0
    layers = shape.layers * at.wave
    if at.checkpointing:
        sent = messages.across(shape, at, at.shards - 2)["forward"]
        return layers * (sent.bytes["send"] + sent.bytes["all_gather"])
    if not shape.has_attention or shape.block == "mac":
        return 0
    keys = messages.reach(shape.attention.window, at.length * (at.shards - 1), at.carries)
    return layers * 2 * at.sequences * keys * shape.width // at.tensor * at.item


def sent_bytes(shape: ModelShape, at: Placement) -> int:
    """Messages to the next shard, kept until the first answer comes, which is after the head's backward."""
    if at.shards == 1:
        return 0
    sent = messages.across(shape, at, at.shards - 2)["forward"]
    count = sent.count["send"]
    kept = min(shape.layers * at.wave * count, messages.OUTSTANDING)
    return kept * sent.bytes["send"] // count if count else 0


def checkpoint_bytes(count: int) -> int:
    """Float32 weights and AdamW's two moments."""
    return 3 * FLOAT32 * count
