"""Combinations that no run may have. Each check looks at several values and yields a problem with its remedy.

A check reads the config as if it were whole. When a value that it needs is itself wrong, the check ends there
(UnknownValueError): that value is already reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from titans_train.config.data_checks import DATA_CHECKS
from titans_train.config.errors import Problem, nearest_divisors, nearest_multiples, use
from titans_train.config.explain import UnknownValueError
from titans_train.config.schema import Model, RunConfig
from titans_train.mixing import units
from titans_train.shape import KERNEL_WIDTHS, beyond_kernels

Check = Callable[[RunConfig], Iterator[Problem]]

ATTENTION_BLOCKS = ("transformer", "mac", "mag", "mal")
WINDOW_BLOCKS = ("transformer", "mag", "mal")
WIDEST_CHUNK = 64  # of RWKV-7: e^(64 * 0.61) is far below the largest float32


def check_config(config: RunConfig, world_size: int | None = None) -> list[Problem]:
    """Everything wrong across sections, and with `world_size` processes if given."""
    return check_partial(config, world_size)


def check_partial(config: Any, world_size: int | None) -> list[Problem]:
    """`config`: a RunConfig, or a `Partial` of one."""
    problems: list[Problem] = []
    checks = [*CHECKS, lambda c: mesh(c, world_size)] if world_size is not None else CHECKS
    for check in checks:
        try:
            problems.extend(check(config))
        except UnknownValueError:
            continue
    return problems


def heads(config: RunConfig) -> Iterator[Problem]:
    model = config.model
    even = 2 if model.block in ATTENTION_BLOCKS else 1
    if model.width % model.heads:
        message = f"{model.heads} heads do not divide model.width {model.width}"
        yield Problem("model.heads", message, use("model.heads", nearest_divisors(model.width, model.heads, even)))
    elif (model.width // model.heads) % even:
        head_dim = model.width // model.heads
        message = f"{model.heads} heads of model.width {model.width} are {head_dim} wide; rotary positions need it even"
        choices = nearest_divisors(model.width, model.heads, even)
        yield Problem("model.heads", message, use("model.heads", choices) or use("model.width", [2 * model.width]))


def feed_forward_width(model: Model) -> int:
    """Of SwiGLU: 8/3 of the width, rounded up to a multiple of 32, which devices and splits like."""
    return model.feed_forward if model.feed_forward is not None else -(-8 * model.width // 96) * 32


def padded_vocabulary(model: Model) -> int:
    """Rows of the table: the same for any parallel.tensor, so that checkpoints fit every layout."""
    return -(-model.vocabulary // model.vocabulary_multiple) * model.vocabulary_multiple


def segment(config: RunConfig) -> Iterator[Problem]:
    if config.model.block != "mac":
        return
    chunk, length = config.memory.chunk_size, config.attention.segment
    if length is None:
        yield Problem("attention.segment", "null, but block mac attends within segments", f"use {8 * chunk}")
        return
    if length % chunk:
        message = f"{length} is not a multiple of memory.chunk_size {chunk}"
        yield Problem("attention.segment", message, use("attention.segment", nearest_multiples(chunk, length)))
    tokens = config.training.sequence_length
    if length % chunk == 0 and tokens % length and config.parallel.sequence == 1:
        message = f"{tokens} is not a multiple of attention.segment {length}"
        choices = nearest_multiples(length, tokens)
        yield Problem("training.sequence_length", message, use("training.sequence_length", choices))


def chunk(config: RunConfig) -> Iterator[Problem]:
    """MAC's segment is a multiple of the chunk, so there `segment` says it all, unless there is no segment."""
    if config.model.block == "transformer" or (config.model.block == "mac" and config.attention.segment is not None):
        return
    if config.parallel.sequence > 1:  # the shards need more
        return
    size, tokens = config.memory.chunk_size, config.training.sequence_length
    if tokens % size:
        message = f"{tokens} is not a multiple of memory.chunk_size {size}"
        choices = nearest_multiples(size, tokens)
        yield Problem("training.sequence_length", message, use("training.sequence_length", choices))


def window(config: RunConfig) -> Iterator[Problem]:
    block, size = config.model.block, config.attention.window
    if block in ("mag", "mal") and size is None:
        message = f"null, but block {block} attends within a sliding window"
        yield Problem("attention.window", message, f"use {max(1, config.training.sequence_length // 2)}")
    elif block in WINDOW_BLOCKS and size is not None and size > config.training.sequence_length:
        tokens = config.training.sequence_length
        message = f"{size} is longer than training.sequence_length {tokens}"
        yield Problem("attention.window", message, f"use at most {tokens}")


def sequence(config: RunConfig) -> Iterator[Problem]:
    """A shard holds whole chunks (MAC: segments), and no convolution reaches over a whole one."""
    shards, length, align = config.parallel.sequence, config.training.sequence_length, _alignment(config)
    if shards == 1:
        return
    if length % (shards * align):
        unit = "segment" if config.model.block == "mac" else "chunk"
        what = "tokens" if align == 1 else f"{unit}s of {align} tokens"
        message = f"{length} cannot be cut into parallel.sequence {shards} equal shards of whole {what}"
        choices = nearest_multiples(shards * align, length)
        yield Problem("training.sequence_length", message, use("training.sequence_length", choices))
    taps = config.memory.convolution
    if config.model.block != "transformer" and taps - 1 > length // shards:
        message = f"{shards} shards of {length // shards} tokens are shorter than memory.convolution {taps} - 1 inputs"
        fitting = [n for n in range(1, length // (taps - 1) + 1) if length % (n * align) == 0]
        yield Problem("parallel.sequence", message, use("parallel.sequence", fitting[-1:] or [1]))


def scan(config: RunConfig) -> Iterator[Problem]:
    """How the scan crosses shards."""
    parallel, model = config.parallel, config.model
    if parallel.scan == "affine":
        linear = config.memory.depth == 1 and not config.memory.residual_norm and config.memory.rule == "titans"
        if model.block in ("transformer", "mac"):
            message = f"affine, but block {model.block} has no scan over a whole sequence"
            yield Problem("parallel.scan", message, "use null or wavefront")
        elif not linear:
            message = (
                f"affine needs a linear memory, but memory.depth is {config.memory.depth} and memory.residual_norm "
                f"{str(config.memory.residual_norm).lower()}"
            )
            yield Problem("parallel.scan", message, "use wavefront, or memory.depth 1 with memory.residual_norm false")
        elif config.memory.forget_to != "zero":
            message = "affine maps lead to zero, but memory.forget_to is start"
            yield Problem("parallel.scan", message, "use wavefront, or memory.forget_to zero")
    wave = parallel.wave or 1
    if wave > 1 and parallel.sequence > 1 and model.block == "mac" and parallel.zero_stage == 3:
        message = f"{wave}, but with block mac over shards ZeRO 3 can go back through one micro-batch at a time only"
        yield Problem("parallel.wave", message, "use 1 or null, or parallel.zero_stage 1")
    rows = config.training.micro_batch_size * (1 if model.block == "mac" else model.heads // parallel.tensor)
    if parallel.sequence > 1 and parallel.pieces is not None and rows and parallel.pieces > rows:
        of = "sequences" if model.block == "mac" else "sequences x heads"
        message = f"{parallel.pieces} is more than the {rows} {of} of a micro-batch on a rank"
        yield Problem("parallel.pieces", message, f"use at most {rows}, or null")


def rule(config: RunConfig) -> Iterator[Problem]:
    """What a memory with another paper's rule cannot be."""
    memory, of = config.memory, f"memory.rule is {config.memory.rule}"
    if config.model.block == "transformer" or memory.rule == "titans":
        return
    if config.model.block == "mac":
        yield Problem("memory.rule", f"{memory.rule}, but block mac reads a memory apart from writing", "use titans")
    if not memory.write:
        yield Problem("memory.write", f"false, but {of}, which always writes", "use true, or memory.rule titans")
    if memory.rule == "rwkv7" and memory.chunk_size > WIDEST_CHUNK:
        message = f"{memory.chunk_size}, but {of}, whose decays fit float32 over at most {WIDEST_CHUNK} tokens"
        yield Problem("memory.chunk_size", message, f"use at most {WIDEST_CHUNK}; it changes no result")
    width = config.model.width // config.model.heads
    if memory.peer_kernels == "fla" and width not in KERNEL_WIDTHS:
        limits = f"even widths of {KERNEL_WIDTHS[0]} to {KERNEL_WIDTHS[-1]}"
        yield Problem("memory.peer_kernels", f"fla, whose kernels take {limits}; heads are {width} wide", "use auto")
    if (config.parallel.pieces or 1) > 1:
        message = f"{config.parallel.pieces}, but {of}, whose state is handed on whole"
        yield Problem("parallel.pieces", message, "use 1 or null")


def kernels(config: RunConfig) -> Iterator[Problem]:
    """What kernels do not take that are asked for."""
    memory, attention = config.memory, config.attention.kernels
    if attention == "flex" and config.model.block == "mac":
        yield Problem("attention.kernels", "flex, but MAC's segments are attended to with masks", "use auto or plain")
    if config.model.block == "transformer" or memory.rule != "titans":
        return
    if memory.kernels in ("compiled", "triton") and memory.forget_to == "start":
        yield Problem("memory.kernels", f"{memory.kernels}, whose kernels forget to zero only", "use auto or plain")
    if memory.kernels != "triton":
        return
    width = config.model.width // config.model.heads
    for limit in beyond_kernels(memory.depth, memory.chunk_size, width, config.run.dtype == "float32"):
        yield Problem("memory.kernels", f"triton, whose kernels take {limit}", "use auto or plain")


def tensor(config: RunConfig) -> Iterator[Problem]:
    """What tensor parallelism cuts must be divisible: heads, feed-forward units, table rows; and tokens of a share."""
    size, model = config.parallel.tensor, config.model
    if size == 1:
        if config.parallel.sequence_parallel:
            message = "true, but parallel.tensor is 1: there is nobody to share the tokens of the residual stream with"
            yield Problem("parallel.sequence_parallel", message, "use false, or parallel.tensor 2 or more")
        return
    if model.heads % size:
        message = f"{size} ranks cannot share model.heads {model.heads} evenly"
        yield Problem("parallel.tensor", message, use("parallel.tensor", nearest_divisors(model.heads, size)))
    units = feed_forward_width(model)
    if units % size:
        message = f"{units} units cannot be shared evenly by parallel.tensor {size} ranks"
        yield Problem("model.feed_forward", message, use("model.feed_forward", nearest_multiples(size, units)))
    if padded_vocabulary(model) % size:
        rows = padded_vocabulary(model)
        message = f"the table's {rows} rows cannot be shared evenly by parallel.tensor {size} ranks"
        remedy = use("model.vocabulary_multiple", nearest_multiples(size, model.vocabulary_multiple))
        yield Problem("model.vocabulary_multiple", message, remedy)
    shards = config.parallel.sequence
    micro, length = config.training.micro_batch_size, config.training.sequence_length
    if config.parallel.sequence_parallel and length % shards == 0 and micro * (length // shards) % size:
        own = length // shards
        message = f"true, but {micro} x {own} tokens of a micro-batch cannot be shared evenly by {size} ranks"
        step = shards * math.lcm(size, _alignment(config))
        remedy = use("training.sequence_length", nearest_multiples(step, length))
        yield Problem("parallel.sequence_parallel", message, f"{remedy}, or false")


def _alignment(config: RunConfig) -> int:
    """Tokens that a sequence's length must be a multiple of; 1: any."""
    if config.model.block == "mac":
        return config.attention.segment or config.memory.chunk_size
    return 1 if config.model.block == "transformer" else config.memory.chunk_size


def precision(config: RunConfig) -> Iterator[Problem]:
    if config.run.dtype == "bfloat16" and config.parallel.zero_stage == 0:
        message = "0 with run.dtype bfloat16 gives wrong losses in DeepSpeed"
        yield Problem("parallel.zero_stage", message, "use 1, or run.dtype float32")


def carried(config: RunConfig) -> Iterator[Problem]:
    """Rows that go on in the next batch: the data must let them, and what they carry must not grow."""
    if not config.training.carry_state:
        return
    if config.data.source != "shards":
        message = f"true, but data.source is {config.data.source}, whose sequences do not continue each other"
        yield Problem("training.carry_state", message, "use false, or data.source shards")
    if config.model.block == "transformer" and config.attention.window is None:
        message = "null, but training.carry_state is true: the keys of block transformer would grow without limit"
        half = max(1, config.training.sequence_length // 2)
        yield Problem("attention.window", message, f"use {half}, or training.carry_state false")
    if config.data.sources is None:
        return
    if config.data.weights_from:
        message = "given, but training.carry_state is true: a row reads one source from its first step to its last"
        yield Problem("data.weights_from", message, "remove it, or training.carry_state false")
    with suppress(ValueError):  # reported by `sources`
        period = sum(units({name: source.weight for name, source in config.data.sources.items()}).values())
        rows = config.training.global_batch_size
        if rows % period:
            message = (
                f"{rows} rows cannot be shared by the weights of data.sources: where rows carry their state, each "
                f"reads one source, so the rows must be a multiple of {period}"
            )
            choices = nearest_multiples(period, rows)
            yield Problem("training.global_batch_size", message, use("training.global_batch_size", choices))


def batch(config: RunConfig) -> Iterator[Problem]:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % micro:
        message = f"{whole} is not a multiple of training.micro_batch_size {micro}"
        choices = nearest_multiples(micro, whole)
        yield Problem("training.global_batch_size", message, use("training.global_batch_size", choices))


def schedule(config: RunConfig) -> Iterator[Problem]:
    warmup, steps = config.optimizer.warmup_steps, config.training.steps
    if warmup > steps:
        message = f"{warmup} is more than training.steps {steps}"
        yield Problem("optimizer.warmup_steps", message, f"use at most {steps}")


def mesh(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Do the batch and the mesh fit `world_size` processes? tensor * sequence * data = world size."""
    assert world_size is not None
    if world_size < 1:
        yield Problem("world size", f"{world_size} processes; the limit is at least 1", "use 1")
        return
    model_ranks = config.parallel.tensor * config.parallel.sequence
    if world_size % model_ranks:
        message = (
            f"{world_size} processes are not a multiple of parallel.tensor x parallel.sequence = "
            f"{config.parallel.tensor} x {config.parallel.sequence} = {model_ranks}"
        )
        yield Problem("world size", message, use("the number of processes", nearest_multiples(model_ranks, world_size)))
        return
    ranks, micro = world_size // model_ranks, config.training.micro_batch_size
    whole = config.training.global_batch_size
    if whole % micro == 0 and whole % (ranks * micro):
        message = (
            f"{whole} sequences cannot be shared by {ranks} data-parallel ranks in micro-batches of {micro}: "
            f"{whole} is not a multiple of {ranks} x {micro} = {ranks * micro}"
        )
        fitting = [n * model_ranks for n in nearest_divisors(whole // micro, ranks)]
        remedy = use("training.global_batch_size", nearest_multiples(ranks * micro, whole))
        yield Problem("training.global_batch_size", message, f"{remedy}, or {use('the number of processes', fitting)}")
        return
    wave, accumulation = config.parallel.wave, whole // (ranks * micro)
    if whole % micro == 0 and wave is not None and accumulation % wave:
        message = f"{wave} does not divide the {accumulation} micro-batches that each rank has per step"
        yield Problem("parallel.wave", message, use("parallel.wave", nearest_divisors(accumulation, wave)))


CHECKS: list[Check] = [
    heads, segment, chunk, window, rule, kernels, sequence, scan, tensor, precision, *DATA_CHECKS, carried, batch,
    schedule,
]  # fmt: skip
