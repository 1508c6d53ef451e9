"""The plan: everything that follows from a config and a number of processes, derived once.

Others read these numbers from the plan and never derive them again; it is printed by `plan` and saved with the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from titans_train import plan_counts as counts
from titans_train import plan_memory as memory
from titans_train import plan_messages as messages
from titans_train.config import ConfigError, RunConfig, check_config
from titans_train.config.checks import feed_forward_width, padded_vocabulary
from titans_train.config.schema import Memory
from titans_train.mixing import phases_of
from titans_train.placement import Placement
from titans_train.plan_memory import ZeroSizes
from titans_train.plan_messages import Messages
from titans_train.plan_sequence import SequencePlan, plan_sequence
from titans_train.shape import AttentionShape, MemoryShape, ModelShape

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
SCANS = {  # by memory.kernels
    "auto": "compiled C++ on a CPU that has a compiler, else plain PyTorch",
    "plain": "plain PyTorch", "compiled": "compiled C++", "triton": "Triton kernels",
}  # fmt: skip


class PlanError(ConfigError):
    """A config that does not fit the number of processes, or that `load_config` would have refused."""


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    shape: ModelShape
    run_directory: Path
    world_size: int  # processes
    data_parallel: int  # ranks that see different sequences
    accumulation: int  # micro-batches per rank and optimiser step
    sequence: SequencePlan  # how sequences are cut, and scans cross the shards
    tokens_per_step: int
    total_tokens: int
    warmup_steps: int
    parameters: dict[str, int]  # by part
    flops_by_part: dict[str, float]  # per token, forward and backward, no recomputation
    memory_bytes: dict[str, int]  # per rank, by part and "total", for the ZeRO stage in use
    memory_by_stage: dict[int, dict[str, int]]  # the same for every ZeRO stage
    zero: ZeroSizes  # what DeepSpeed is told
    placement: Placement  # what decides a rank's memory and messages
    messages: dict[str, Messages]  # between ranks: per layer and micro-batch, and per step
    carried_bytes: int  # of one row, all heads, from one global batch to the next (0: training.carry_state is off)
    checkpoint_bytes: int

    @property
    def parameter_count(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> float:
        return sum(self.flops_by_part.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, every number and the config that they came from."""
        return {
            "config": self.config.model_dump(mode="json"),
            "shape": self.shape.to_dict(),
            "run_directory": str(self.run_directory),
            "mesh": {"world_size": self.world_size, **self._mesh()},
            "batch": {
                "accumulation": self.accumulation,
                "tokens_per_step": self.tokens_per_step,
                "total_tokens": self.total_tokens,
                "warmup_steps": self.warmup_steps,
            },
            "sequence": asdict(self.sequence),
            "parameters": {**self.parameters, "total": self.parameter_count},
            "flops_per_token": {**self.flops_by_part, "total": self.flops_per_token},
            "memory_bytes_per_rank": self.memory_bytes,
            "memory_bytes_by_zero_stage": {str(stage): dict(b) for stage, b in self.memory_by_stage.items()},
            "messages": {part: {"count": dict(m.count), "bytes": dict(m.bytes)} for part, m in self.messages.items()},
            "carried_bytes_per_row": self.carried_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
        }

    def _mesh(self) -> dict[str, int]:
        parallel = self.config.parallel
        return {"data": self.data_parallel, "sequence": parallel.sequence, "tensor": parallel.tensor}

    @property
    def mesh_text(self) -> str:
        """'4 processes = data 2 x sequence 1 x tensor 2'"""
        mesh = " x ".join(f"{name} {size}" for name, size in self._mesh().items())
        return f"{processes(self.world_size)} = {mesh}"

    def describe(self) -> str:
        """The plan for people."""
        sections = [self._describe_run(), self._describe_parameters(), self._describe_flops(), self._describe_memory()]
        if self.world_size > 1:
            sections.insert(1, self._describe_layout())
        return "\n\n".join("\n".join(lines) for lines in sections)

    def _describe_run(self) -> list[str]:
        c, s = self.config, self.shape
        t = c.training
        lines = [f"run         {self.run_directory}, {c.run.dtype}, seed {c.run.seed}"]
        lines.append(
            f"model       {s.block}: {s.layers} layers, width {s.width}, {s.heads} heads of {s.head_dim}, "
            f"feed-forward {s.feed_forward}, vocabulary {s.vocabulary}{', tied head' if s.tied_head else ''}"
            f"{', element-wise parts by torch.compile' if s.compile else ''}"
        )
        if s.memory is not None:
            m = s.memory
            own = f"depth {m.depth}, hidden {m.hidden}, theta up to {m.theta_max:.3g}, a state kept every"
            what = f"{own} {m.store_every} chunks; scan: {SCANS[m.kernels]}" if m.rule == "titans" else f"rule {m.rule}"
            lines.append(f"memory      chunk {m.chunk_size}, {what}")
        if s.has_attention:
            a = s.attention
            reach = f"segment {a.segment}" if a.segment is not None else f"window {a.window or 'all'}"
            by = ", FlexAttention" if a.kernels == "flex" else ""
            lines.append(f"attention   {reach}, {a.persistent_tokens} persistent tokens{by}")
        batch = f"{t.global_batch_size} sequences x {t.sequence_length} tokens = {self.tokens_per_step:,} tokens"
        keep, disk = c.checkpoint, self.checkpoint_bytes
        kept = keep.keep + keep.keep_best + (t.steps // keep.keep_every if keep.keep_every else 0)
        together = f"{human_bytes((kept + 1) * disk)} while one is written beside {kept}"
        host = f"; {human_bytes(disk // self.world_size)} of each rank's host memory"
        carried = [f"carried     {human_bytes(self.carried_bytes)} for each row of a batch, into the next batch"]
        return [
            *lines,
            *(carried if self.carried_bytes else []),
            *(f"data        {line}" for line in self._describe_mixture()),
            f"mesh        {self.mesh_text}; ZeRO stage {c.parallel.zero_stage}",
            f"step        {batch}; each rank {self.accumulation} x {t.micro_batch_size} sequences, "
            f"{_waves(self.sequence.wave, self.accumulation)}",
            f"training    {t.steps:,} steps, {self.warmup_steps:,} of warm-up: {self.total_tokens:,} tokens",
            f"checkpoint  {human_bytes(disk)} each, {together}{host}",
        ]

    def _describe_mixture(self) -> list[str]:
        """Shares of the sources, from each step at which they change."""
        data = self.config.data
        if data.sources is None:
            return []
        return [
            f"from step {steps + 1}: "
            + ", ".join(f"{name} {w / sum(weights.values()):.2%}" for name, w in weights.items())
            for steps, weights in phases_of(data)
        ]

    def _describe_layout(self) -> list[str]:
        """Which ranks hold what, and what they send each other."""
        s, p = self.shape, self.config.parallel
        heads, units, rows = (n // p.tensor for n in (s.heads, s.feed_forward, s.padded_vocabulary))
        lines = ["layout"]
        if p.tensor > 1:
            stream = "a share of the tokens" if p.sequence_parallel else "all tokens"
            models = [_ranks(i * p.tensor, 1, p.tensor) for i in range(self.data_parallel)]
            lines += [
                f"  one model on ranks {_first_of(models)}",
                f"  the i-th of these: {heads} heads from {heads}i on, {units} feed-forward units, "
                f"{rows} rows of the vocabulary's table; {stream} of the residual stream",
            ]
        if p.sequence > 1:
            shards = [_ranks(i, p.tensor, p.sequence) for i in range(p.tensor)]
            lines.append(
                f"  one sequence on ranks {_first_of(shards)}: {self.sequence.length:,} tokens each, from left to right"
            )
            lines += self._describe_sequence()
        stride = p.tensor * p.sequence
        replicas = [_ranks(i, stride, self.data_parallel) for i in range(stride)]
        lines.append(f"  same weights, other tokens: ranks {_first_of(replicas)}")
        for part, m in self.messages.items():
            if m.count:
                lines.append(f"  {part:<44}{m}, {human_bytes(m.total_bytes)}")
        lines.append(
            "  (bytes of whole tensors; in a ring of n ranks each sends (n-1)/n of them, twice for an all-reduce)"
        )
        return lines

    def _describe_sequence(self) -> list[str]:
        s = self.sequence
        waves = _waves(s.wave, self.accumulation)
        pieces = "one piece" if s.pieces == 1 else f"{s.pieces} pieces"
        how = {"affine": "affine maps", "window": "keys handed on"}.get(s.strategy, f"wavefront in {pieces}")
        lines = [f"  scan over shards: {how}, {waves}; predicted efficiency {s.efficiency:.1%} ({s.reason})"]
        return lines + [f"  warning: {text}" for text in s.warnings]

    def _describe_parameters(self) -> list[str]:
        total = self.parameter_count
        rows = [f"  {name:<24}{n:>16,}{n / total:>8.1%}" for name, n in self.parameters.items() if n]
        return ["parameters", *rows, f"  {'total':<24}{total:>16,}"]

    def _describe_flops(self) -> list[str]:
        total = self.flops_per_token
        rows = [f"  {name:<24}{n:>16,.0f}{n / total:>8.1%}" for name, n in self.flops_by_part.items() if n]
        return [
            "FLOPs per token, forward and backward", *rows, f"  {'total':<24}{total:>16,.0f}",
            f"  whole run {total * self.total_tokens:.3g}",
        ]  # fmt: skip

    def _describe_memory(self) -> list[str]:
        """One column per ZeRO stage, the one in use marked."""
        used = self.config.parallel.zero_stage
        stages = list(self.memory_by_stage)
        head = "".join(f"{('*' if stage == used else '') + f'ZeRO {stage}':>14}" for stage in stages)
        rows = [
            f"  {part:<24}" + "".join(f"{human_bytes(self.memory_by_stage[stage][part]):>14}" for stage in stages)
            for part in self.memory_bytes
        ]
        return [f"{'memory per process':<26}{head}", *rows, "  (* in use; activations are an estimate)"]


def resolve_shape(config: RunConfig) -> ModelShape:
    """The architecture with every default filled in. What a block does not use is left out (None, or 0)."""
    m, memory, a, block = config.model, config.memory, config.attention, config.model.block
    return ModelShape(
        block=block,
        layers=m.layers,
        width=m.width,
        heads=m.heads,
        head_dim=m.width // m.heads,
        vocabulary=m.vocabulary,
        padded_vocabulary=padded_vocabulary(m),
        feed_forward=feed_forward_width(m),
        tied_head=m.tied_head,
        norm_eps=float(m.norm_eps),
        initializer_std=float(m.initializer_std),
        memory=None if block == "transformer" else _resolve_memory(config),
        attention=AttentionShape(
            window=a.window if block in ("transformer", "mag", "mal") else None,
            segment=a.segment if block == "mac" else None,
            residual=block == "mac" and a.residual,
            persistent_tokens=0 if block == "transformer" or memory.rule != "titans" else a.persistent_tokens,
            rope_base=float(a.rope_base),
            kernels=a.kernels,
        ),
        compile=config.model.compile,
    )


def _resolve_memory(config: RunConfig) -> MemoryShape:
    """theta_max: c / b keeps a chunk's writes stable, c = 4 with the norm inside the memory, else 1.

    store_every: a state every 16 chunks; for chunks above 64 fewer, since recomputing keeps about 1024 tokens' worth.
    """
    m, head_dim = config.memory, config.model.width // config.model.heads
    if m.rule != "titans":
        return _peer_memory(m, head_dim)
    limit = 4.0 if m.residual_norm else 1.0
    return MemoryShape(
        rule=m.rule,
        chunk_size=m.chunk_size,
        depth=m.depth,
        hidden=m.expansion * head_dim,
        activation=m.activation,
        residual_norm=m.residual_norm,
        momentum=m.momentum and m.write,
        forget_to=m.forget_to if m.forgetting and m.write else "zero",
        forgetting=m.forgetting and m.write,  # else the state before would still depend on the text
        write=m.write,
        normalize_values=m.normalize_values,
        convolution=m.convolution,
        key_start=m.key_start,
        gate=m.gate,
        theta_max=float(m.theta_max) if m.theta_max is not None else limit / m.chunk_size,
        couple_theta=m.couple_theta,
        forget_bias=float(m.forget_bias),
        momentum_bias=float(m.momentum_bias),
        theta_bias=float(m.theta_bias),
        store_every=m.store_every if m.store_every is not None else min(16, max(1, 1024 // m.chunk_size)),
        kernels=m.kernels,
    )


def _peer_memory(m: Memory, head_dim: int) -> MemoryShape:
    """A matrix per head, from zero; what only the Titans memory has is off."""
    return MemoryShape(
        rule=m.rule, chunk_size=m.chunk_size, depth=1, hidden=head_dim, activation="silu", residual_norm=False,
        momentum=False, forgetting=False, forget_to="zero", write=True, normalize_values=False,
        convolution=m.convolution, key_start=m.key_start, gate=m.gate, theta_max=1.0, couple_theta=False,
        forget_bias=0.0, momentum_bias=0.0, theta_bias=0.0, store_every=1, peer_kernels=m.peer_kernels,
    )  # fmt: skip


def make_plan(config: RunConfig, world_size: int | None = None) -> Plan:
    """Derives the plan for `world_size` processes (None: 1).

    Errors: PlanError with every problem, such as a batch that the processes cannot share evenly.
    """
    world_size = 1 if world_size is None else world_size
    problems = check_config(config, world_size)
    if problems:
        raise PlanError(problems, f"run {config.run.name} on {processes(world_size)}")
    shape, t = resolve_shape(config), config.training
    data_parallel = world_size // (config.parallel.tensor * config.parallel.sequence)
    parameters = counts.parameters(shape)
    count = sum(parameters.values())
    accumulation = t.global_batch_size // (data_parallel * t.micro_batch_size)
    sequence = _sequence(config, shape, accumulation)
    placement = _placement(config, data_parallel, accumulation, sequence)
    by_stage = {stage: memory.memory(shape, placement, stage) for stage in memory.ZERO_STAGES}
    tokens_per_step = t.global_batch_size * t.sequence_length
    carried = messages.carried_row_bytes(shape, replace(placement, tensor=1)) if t.carry_state else 0
    return Plan(
        config=config,
        shape=shape,
        run_directory=Path(config.run.folder) / config.run.name,
        world_size=world_size,
        data_parallel=data_parallel,
        accumulation=accumulation,
        sequence=sequence,
        tokens_per_step=tokens_per_step,
        total_tokens=t.steps * tokens_per_step,
        warmup_steps=config.optimizer.warmup_steps,
        parameters=parameters,
        flops_by_part=counts.flops_per_token(shape, t.sequence_length),
        memory_bytes=by_stage[config.parallel.zero_stage],
        memory_by_stage=by_stage,
        zero=memory.zero_sizes(shape, placement, config.parallel.zero_stage),
        placement=placement,
        messages=_messages(shape, placement, config.parallel.zero_stage),
        carried_bytes=carried,
        checkpoint_bytes=memory.checkpoint_bytes(count) + carried * t.global_batch_size,
    )


def _sequence(config: RunConfig, shape: ModelShape, accumulation: int) -> SequencePlan:
    t, p = config.training, config.parallel
    return plan_sequence(
        shape, shards=p.sequence, length=t.sequence_length, sequences=t.micro_batch_size, tensor=p.tensor,
        micro_batches=accumulation, stage=p.zero_stage, strategy=p.scan, pieces=p.pieces, wave=p.wave,
    )  # fmt: skip


def _placement(config: RunConfig, replicas: int, accumulation: int, sequence: SequencePlan) -> Placement:
    t, p = config.training, config.parallel
    return Placement(
        tensor=p.tensor, replicas=replicas * p.sequence, sequence_parallel=p.sequence_parallel,
        item=ITEM_BYTES[config.run.dtype], sequences=t.micro_batch_size, length=sequence.length,
        accumulation=accumulation, checkpointing=t.activation_checkpointing, shards=p.sequence,
        pieces=sequence.pieces, wave=sequence.wave, strategy=sequence.strategy, carries=t.carry_state,
    )  # fmt: skip


def _messages(shape: ModelShape, at: Placement, stage: int) -> dict[str, Messages]:
    found = {}
    if at.tensor > 1:
        one = messages.layer(shape, at)
        parts = ["forward", "backward", *(["recomputed"] if at.checkpointing else [])]
        found = {f"a layer's {part}, each micro-batch": one[part] for part in parts}
        found["a layer's shared parameters' gradients"] = one["shared"]
        found["tensor-parallel ranks, each step"] = messages.step(shape, at)
    if at.shards > 1:
        last = at.shards - 1
        found["a layer's forward, to the next shard"] = messages.across(shape, at, last - 1)["forward"]
        found["a layer's backward, to the shard before"] = messages.across(shape, at, last)["backward"]
        if at.carries:
            found["carried state, last shard to first, each step"] = messages.carried(shape, at)
    if at.replicas > 1:
        size = counts.parameters_per_rank(shape, at.tensor) * at.item
        found[f"ZeRO {stage}, each step, in buckets"] = messages.zero(size, stage, at.accumulation // at.wave)
    return found


def _waves(wave: int, micro_batches: int) -> str:
    return "a backward after each" if wave == 1 else f"a backward after {wave} of {micro_batches} forwards"


def _first_of(items: list[str]) -> str:
    return ", ".join(items[:4]) + (", ..." if len(items) > 4 else "")


def _ranks(first: int, stride: int, count: int) -> str:
    """'0 1 2 3'; of many only the ends"""
    all_of = [first + stride * i for i in range(count)]
    shown = all_of if count <= 4 else [*all_of[:2], "..", all_of[-1]]
    return "[" + " ".join(map(str, shown)) + "]"


def human_bytes(n: int) -> str:
    """12345678 -> '11.8 MiB'"""
    value, units = float(n), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def processes(n: int) -> str:
    return f"{n} process" if n == 1 else f"{n} processes"
