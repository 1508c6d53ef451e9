"""Counting formulas: parameters and FLOPs. Pure functions of a model shape; each states what it counts.

Legend: D width, H heads, d = D/H, V vocabulary, F feed-forward width, P persistent tokens, K convolution taps,
b chunk, h memory hidden width, L sequence length.
"""

from __future__ import annotations

import math
from itertools import pairwise

from titans_train.shape import MemoryShape, ModelShape, part_tokens

# -- parameters -------------------------------------------------------------------------------------------------


def memory_layers(shape: ModelShape) -> list[tuple[int, int]]:
    """(inputs, outputs) of each weight matrix of one head's memory; empty without memory."""
    if shape.memory is None:
        return []
    sizes = [shape.head_dim, *[shape.memory.hidden] * (shape.memory.depth - 1), shape.head_dim]
    return list(pairwise(sizes))


def fast_weights(shape: ModelShape) -> int:
    """Numbers in the weights of the memory of one layer, all heads: H * sum of inputs * outputs."""
    return shape.heads * sum(i * o for i, o in memory_layers(shape))


def memory_core(shape: ModelShape, m: MemoryShape) -> int:
    """q, k, v projections 3 D^2; their convolutions 3 D K; gates D H + H each; initial weights; gain and bias 2 D.

    Another paper's rule: the same projections and convolutions, its gates of n numbers D n, and its constants.
    """
    width = shape.width
    convolutions = 3 * width * m.convolution if m.convolution > 1 else 0
    if m.rule != "titans":
        constants = sum(math.prod(size) for size in shape.peer_constants().values())
        return 3 * width**2 + convolutions + width * sum(shape.peer_gates().values()) + constants
    gates = (m.forgetting + m.momentum + m.write) * (width * shape.heads + shape.heads)
    return 3 * width**2 + convolutions + gates + fast_weights(shape) + (2 * width if m.residual_norm else 0)


def block_parameters(shape: ModelShape) -> dict[str, int]:
    """Parameters of one block by part; the block's own layers are listed in `models/blocks.py` and `models/mac.py`."""
    width, m, block = shape.width, shape.memory, shape.block
    square = width**2
    core = memory_core(shape, m) if m is not None else 0
    mixer = core + width + 2 * square  # memory, output norm, linear gate, output projection
    # part: attention, memory, combination of the two, number of RMSNorms
    attention, memory, combine, norms = {
        "transformer": (4 * square, 0, 0, 2),
        "lmm": (0, mixer, 0, 2),
        "mag": (3 * square, core, 2 * width + square, 2),  # two scales, one output projection
        "mac": (4 * square, core + width, 2 * width + square, 2),  # core and the norm of what is read
        "mal": (4 * square, mixer, 0, 3),
    }[block]
    return {
        "persistent": shape.attention.persistent_tokens * width if shape.has_memory else 0,
        "attention": attention,
        "memory": memory,
        "combine": combine,
        "feed_forward": 3 * width * shape.feed_forward,
        "norms": norms * width,
    }


def parameters(shape: ModelShape) -> dict[str, int]:
    """Trainable parameters of the whole model by part. A tied head is the embedding and counts once."""
    blocks = {part: shape.layers * n for part, n in block_parameters(shape).items()}
    blocks["norms"] += shape.width  # the last norm
    table = shape.padded_vocabulary * shape.width
    return {"embedding": table, **blocks, "head": 0 if shape.tied_head else table}


def shared_parameters(shape: ModelShape) -> int:
    """Those that every tensor-parallel rank holds whole: norms of the residual stream, and persistent tokens."""
    one = block_parameters(shape)
    return shape.layers * (one["persistent"] + one["norms"]) + shape.width


def parameters_per_rank(shape: ModelShape, tensor: int) -> int:
    whole, shared = sum(parameters(shape).values()), shared_parameters(shape)
    return shared + (whole - shared) // tensor


# -- FLOPs per token --------------------------------------------------------------------------------------------


def attention_keys(shape: ModelShape, length: int) -> float:
    """Keys that a query sees, on average over the `length` tokens of a sequence (causal, P included).

    Window w: token t sees min(t, w). MAC: within a segment of C tokens, t of x and t of what was read.
    """
    a = shape.attention
    if not shape.has_attention:
        return 0.0
    if shape.block == "mac":
        assert a.segment is not None
        return a.persistent_tokens + min(a.segment, length) + 1.0
    w = length if a.window is None else min(a.window, length)
    seen = (w * (w + 1) / 2 + (length - w) * w) / length
    return seen + (a.persistent_tokens if shape.has_memory else 0)


def scan_forward_flops(shape: ModelShape, length: int) -> float:
    """Matrix products of the memory scan, forward, per token, all heads of one layer.

    A layer i x o of the memory costs per token and head 2 i o for each of: keys forward, weights read, momentum read,
    weights updated, momentum updated, and the base read that forgetting leads to; 2 i o for the inner backward (not in
    the first layer); and 2 b (i + o) for the products within a chunk, by parts of at most 64 tokens, however the scan
    runs (shape.part_tokens), and with what is above their diagonals. Two layers d x h x d that forget to zero: 22 d h +
    4 b (d + h). Gates, norms and activations are not counted.
    """
    if shape.memory is None:
        return 0.0
    chunk = min(shape.memory.chunk_size, length)
    if shape.memory.rule != "titans":
        return peer_forward_flops(shape, chunk)
    tokens = part_tokens(chunk)
    products = (5 if shape.memory.momentum else 3) + (shape.memory.forget_to == "start")
    flops = 0
    for n, (i, o) in enumerate(memory_layers(shape)):
        flops += 2 * i * o * (products + (n > 0)) + 2 * tokens * (i + o)
    return float(shape.heads * flops)


def peer_forward_flops(shape: ModelShape, chunk: int) -> float:
    """Of memory/peers/scan.py, per token, all heads: 4 d^2 to read and write the state and 4 b d within the chunk.

    Rules that also remove (all but Mamba2): three more b x b products and their uses, the triangular system, and the
    state's change: 14 b d + 4 d^2 + 2 d^3 / b.
    """
    assert shape.memory is not None
    d, flops = shape.head_dim, 4.0 * shape.head_dim**2 + 4 * chunk * shape.head_dim
    if shape.memory.rule != "mamba2":
        flops += 14 * chunk * d + 4 * d**2 + 2 * d**3 / chunk
    return shape.heads * flops


def flops_per_token(shape: ModelShape, length: int) -> dict[str, float]:
    """Forward and backward FLOPs per token by part, as for model-FLOPs utilisation: recomputation not counted.

    A weight used once per token: 6 (2 forward, 4 backward). Attention: 12 D per key seen (2 D for the score and
    2 D for the sum, three times over). The scan: three times its forward. The head: 6 D V, tied or not.
    MAC uses some weights twice: k and v of attention also on what was read, the memory's projections (without residual:
    q's) on the segment and on what was attended, its q convolution also to read; and it reads the memory once more (2 i
    o per layer and head).
    """
    width, layers = shape.width, shape.layers
    per_block = block_parameters(shape)
    scan = 3 * scan_forward_flops(shape, length)
    taps = shape.memory.convolution if shape.memory is not None and shape.memory.convolution > 1 else 0
    m = shape.memory
    fixed = fast_weights(shape) if m is not None and m.rule == "titans" else 0
    fixed += 2 * width if m is not None and m.residual_norm else 0
    memory = 6 * max(per_block["memory"] - fixed, 0)
    attention = 6 * per_block["attention"]
    if shape.block == "mac":
        attention += 6 * 2 * width**2
        assert m is not None
        gates = (m.forgetting + m.momentum + m.write) * width * shape.heads
        twice = 3 * width**2 + gates if shape.attention.residual else width**2
        memory += 6 * (twice + width * taps)
        scan += 6 * fast_weights(shape)
    return {
        "attention_projections": float(layers * attention),
        "attention_scores": layers * 12 * width * attention_keys(shape, length),
        "memory_projections": float(layers * memory),
        "memory_scan": layers * scan,
        "combine": float(layers * 6 * per_block["combine"]),
        "feed_forward": float(layers * 6 * per_block["feed_forward"]),
        "head": float(6 * width * shape.padded_vocabulary),
    }
