"""How the scan crosses sequence shards: which strategy, how many pieces, waves of how many micro-batches, and why.

Predictions are ratios of matrix products: what a rank computes, of what it computes and waits for. Legend: N layers,
M micro-batches per step, in waves of K (K forwards, then one backward), P shards, G pieces of a scan; per layer and
micro-batch f and b: its forward and backward on one rank, s_f and s_b: of them what stands between receiving a state
and handing it on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from titans_train import plan_counts as counts
from titans_train.shape import ModelShape

ENOUGH = 0.90  # waves are made longer only below this: each micro-batch of a wave keeps its activations
MOST_PIECES, LONGEST_WAVE = 16, 8
# Each further piece costs a scan as much as so many more rows, for it repeats every chunk's small operations: measured
# by `benchmark sequence compute` (8 rows of 64 x 256, chunk 64, on a CPU: 2 pieces +5 to +15 %, 4 +31 to +40 %).
PIECE_ROWS = 0.9
# Triton's kernels walk over the chunks with one program per row (batch x heads), and a program fills a multiprocessor
# (all its registers): fewer rows than these take as long as one. An H100's and an H200's, by NVIDIA's data sheet.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class SequencePlan:
    shards: int
    length: int  # tokens of a shard
    strategy: str  # "wavefront", "affine"; "window" where no memory crosses shards
    pieces: int
    wave: int  # micro-batches forwarded before their backward
    efficiency: float  # predicted, of P ranks
    reason: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """Products per token, forward, of one layer, in FLOPs; the head's apart."""

    layer: float  # f, on average over the shards
    slowest: float  # the same on the shard with most keys to see
    chain: float  # s_f
    again: float  # of the chain, what its backward repeats
    affine: float  # what the affine scan adds, forward and backward
    head: float

    @property
    def both(self) -> float:
        """f + b: a backward is twice the forward, and what is repeated."""
        return 3 * self.layer + self.again

    @property
    def waiting(self) -> float:
        """s_f + s_b"""
        return 3 * self.chain + self.again


def work(shape: ModelShape, length: int, shards: int) -> Work:
    """length: of the whole sequence."""
    parts = {name: value / 3 / shape.layers for name, value in counts.flops_per_token(shape, length).items()}
    head = parts.pop("head") * shape.layers
    layer, scores = sum(parts.values()), parts["attention_scores"]
    slowest = layer
    if shape.has_attention and shape.attention.window is None and shape.block == "transformer":
        slowest += scores * (2 * shards - 1) / shards - scores  # the last shard's queries see most keys
    chain, again = parts["memory_scan"], parts["memory_scan"]
    if shape.block == "mac":  # a segment's every step depends on the memory that the one before has left
        of_x = 6 if shape.attention.residual else 4  # q, k, v of attention, and of memory or its q alone
        outside = parts["feed_forward"] + 2 * (of_x + 1) * shape.width**2  # and the output projection
        chain, again = layer - outside, parts["memory_scan"]
    return Work(layer, slowest, chain, again, affine_flops(shape), head)


def affine_flops(shape: ModelShape) -> float:
    """Products per token that the affine scan adds (memory/affine.py): the map of a shard, and its adjoint."""
    m = shape.memory
    if m is None or not is_linear(shape):
        return 0.0
    d = shape.head_dim
    return shape.heads * ((18 + 10 if m.momentum else 8 + 6) * d**2 + 4.0 * m.chunk_size * d)


def is_linear(shape: ModelShape) -> bool:
    """Whether the scan has an affine form."""
    m = shape.memory
    linear = m is not None and m.rule == "titans" and m.depth == 1 and not m.residual_norm and m.forget_to == "zero"
    return linear and shape.block != "mac"


def efficiency(
    w: Work,
    layers: int,
    shards: int,
    micro_batches: int,
    pieces: int,
    wave: int,
    *,
    affine: bool = False,
    blocked: bool = False,
    rows: float = float("inf"),
    programs: int | None = None,
) -> float:
    """M (N (f + b) + head) / T, with T = M (N (f + b) + head) + (M N c + ceil(M / K) (P - 1) (1 + c) / G) (s_f + s_b).

    c, what G pieces cost more than one: (G - 1) PIECE_ROWS / rows; with Triton's kernels what they leave idle, given
    `programs`, theirs for all pieces. A message's latency is not counted. affine: no waiting, more work. blocked: all
    shards meet in every layer and direction, so that each waits for the whole wavefront: M N in place of ceil(M / K).
    """
    ideal = micro_batches * (layers * w.both + 3 * w.head)
    time = ideal + micro_batches * layers * 3 * (w.slowest - w.layer)
    if affine:
        return ideal / (time + micro_batches * layers * w.affine)
    waits = micro_batches * layers if blocked else -(-micro_batches // wave)
    if programs is None:
        cost = (pieces - 1) * PIECE_ROWS / rows
    else:
        cost = max(programs, pieces * MULTIPROCESSORS) / max(programs, MULTIPROCESSORS) - 1
    time += w.waiting * (micro_batches * layers * cost + waits * (shards - 1) * (1 + cost) / pieces)
    return ideal / time


def plan_sequence(
    shape: ModelShape,
    *,
    shards: int,
    length: int,
    sequences: int,
    tensor: int,
    micro_batches: int,
    stage: int,
    strategy: str | None,
    pieces: int | None,
    wave: int | None,
) -> SequencePlan:
    """strategy, pieces, wave: None where they may be chosen."""
    if shards == 1:
        return SequencePlan(1, length, "wavefront", 1, wave or 1, 1.0, "the sequence is whole")
    w = work(shape, length, shards)
    rows = sequences * (1 if shape.block == "mac" else shape.heads // tensor)
    programs = None
    if shape.memory is not None and shape.memory.rule != "titans":
        rows = 1  # the state is handed on whole
    elif shape.memory is not None and shape.memory.kernels == "triton":
        programs = sequences * shape.heads // tensor

    def predicted(pieces: int, wave: int, affine: bool = False, blocked: bool = False) -> float:
        options = {"affine": affine, "blocked": blocked, "rows": rows, "programs": programs}
        return efficiency(w, shape.layers, shards, micro_batches, pieces, wave, **options)  # type: ignore[arg-type]

    if not shape.has_memory:
        reason = "keys are handed on" + ("" if shape.attention.window else ", and the last shard sees most of them")
        return SequencePlan(shards, length // shards, "window", 1, wave or 1, predicted(1, wave or 1), reason)
    longest = 1 if shape.block == "mac" and stage == 3 else LONGEST_WAVE  # DeepSpeed 0.19 would reduce twice
    waves = [wave] if wave else [k for k in range(1, longest + 1) if micro_batches % k == 0]
    most = min(rows, MOST_PIECES, MOST_PIECES if programs is None else programs // MULTIPROCESSORS)
    cuts = [pieces] if pieces else list(range(1, max(1, most) + 1))

    def choose(blocked: bool) -> tuple[float, int, int]:
        """Predicted efficiency, pieces, wave: the shortest wave that is good enough with the best number of pieces."""
        best = [max((predicted(g, k, blocked=blocked), -g, -k) for g in cuts) for k in waves]
        found = next((b for b in best if b[0] >= ENOUGH), max(best))
        return found[0], -found[1], -found[2]

    by_wave, chosen_pieces, chosen_wave = choose(blocked=stage == 3)
    by_map = predicted(1, 1, affine=True) if is_linear(shape) else 0.0
    affine = strategy == "affine" or (strategy is None and by_map > by_wave)
    reason, own = _reason(shape, affine, by_wave, by_map, strategy) + _idle(programs), length // shards
    if affine:
        return SequencePlan(shards, own, "affine", 1, wave or 1, by_map, reason)
    plan = SequencePlan(shards, own, "wavefront", chosen_pieces, chosen_wave, by_wave, reason)
    if stage < 3:
        return plan
    text = (
        f"ZeRO 3 gathers every layer's parameters over the shards too, so that all meet in every layer: predicted "
        f"efficiency {by_wave:.1%} (nothing prefetched), with ZeRO 1 or 2 {choose(blocked=False)[0]:.1%}"
    )
    return replace(plan, warnings=(text,))


def _reason(shape: ModelShape, affine: bool, by_wave: float, by_map: float, asked: str | None) -> str:
    if asked is not None:
        return "parallel.scan asks for it"
    if shape.block == "mac":
        return "MAC's writes depend on what was read: only the wavefront can cross shards"
    if not is_linear(shape):
        return "the memory has no affine form: only the wavefront can cross shards"
    if affine:
        return f"the wavefront would reach {by_wave:.1%}"
    return f"the affine scan would reach {by_map:.1%}"


def _idle(programs: int | None) -> str:
    if programs is None or programs >= MULTIPROCESSORS:
        return ""
    return (
        f"; Triton's kernels walk over {programs} rows (batch x heads) at once, and a GPU has room for "
        f"{MULTIPROCESSORS}: more rows would take as long, and pieces of them do not pay"
    )
