"""What each process of `benchmark sequence` does: waits in place of work, and training steps whose memory is watched.

`waits`: the scan's own loop over pieces, its messages, their order and the waiting are the real ones (Shards, Links,
_Wave); only the work on a piece's tokens is replaced by a sleep, and the rest of a layer by two more.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titans_train.benchmark.tensor_memory import TensorMemory
from titans_train.memory import MemoryState
from titans_train.memory.rows import RowGradients, Rows, State

Row = dict[str, Any]
QUIET = 0.2  # cores that others may keep busy in a row worth keeping
WIDTH = 2  # of a head in `waits`: as little as there can be


def work(job: Path) -> None:
    """Reads layouts of a part from the file, and writes their rows to it."""
    from titans_train.benchmark.sequence_compute import compute
    from titans_train.parallel import mesh_of, process_group

    parts: dict[str, Callable[[Any, Row], Row]] = {"waits": waits, "compute": compute, "memory": memory, "long": long}
    wanted = json.loads(job.read_text())
    with process_group() as whole, mesh_of(1, whole.world_size) as mesh:
        run, patience = parts[wanted["part"]], wanted.get("patience", 0.0)
        rows = [{**layout, **patiently(partial(run, mesh, layout), patience)} for layout in wanted["layouts"]]
        if whole.is_first:
            job.write_text(json.dumps(rows))


def together(run: Callable[[], Any]) -> float:
    """Seconds from the first rank's start to the last one's end: clocks of one machine. Collective."""
    from titans_train.parallel import gather

    dist.barrier()
    started = time.monotonic()
    run()
    spans = gather((started, time.monotonic()))
    return max(stop for _, stop in spans) - min(start for start, _ in spans)


def patiently(measure: Callable[[], Row], seconds: float) -> Row:
    """Measures again, for so long, while other programs keep cores busy; the least disturbed row. Collective."""
    from titans_train.parallel import gather

    end, best = time.monotonic() + seconds, measure()
    while best.get("others", 0.0) > QUIET and gather(time.monotonic() < end)[0]:
        with OtherWork() as others:
            time.sleep(2)
        if others.cores <= QUIET:
            best = min(best, measure(), key=lambda row: row["others"])
    return best


class OtherWork:
    """Within `with OtherWork() as others`: then others.cores, the cores that other programs kept busy. Collective.

    Not a number where there is no /proc/stat.
    """

    def __enter__(self) -> OtherWork:
        self.cores = float("nan")
        self._before = self._now()
        return self

    def __exit__(self, *_: Any) -> None:
        from titans_train.parallel import gather

        elapsed, busy, own = (b - a for a, b in zip(self._before, self._now(), strict=True))
        self.cores = max(gather((busy - sum(gather(own))) / elapsed)[0], 0.0)  # in this order NaN stays

    def _now(self) -> tuple[float, float, float]:
        """Seconds: a clock, all programs on all cores, this process."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        except OSError:
            return time.monotonic(), float("nan"), time.process_time()
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), busy, time.process_time()


# ---- waits


@cache
def overshoot() -> float:
    """Seconds that a sleep takes too long, as a rule."""
    late = []
    for _ in range(50):
        started = time.perf_counter()
        time.sleep(2e-3)
        late.append(time.perf_counter() - started - 2e-3)
    return statistics.median(late)


def pause(seconds: float) -> None:
    if seconds > overshoot():
        time.sleep(seconds - overshoot())


class Beside(torch.autograd.Function):
    """A part of a layer that is no scan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        pause(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        pause(ctx.seconds)
        return gradient, None, None


@contextmanager
def sleeping_scans(forward: float, backward: float) -> Iterator[None]:
    """A piece sleeps so many seconds, and adds 1 to its state, and to the gradient of its state."""
    from titans_train.parallel import wavefront

    def forward_rows(rows: Rows, grid: Any, y: Tensor, surprises: Any = None) -> tuple[State, list[Tensor]]:
        pause(forward)
        y.zero_()
        return ([w + 1 for w in rows.weights], rows.momentum, []), []

    class RowsBackward:
        def __init__(self, rows: Rows, grid: Any, kept: Any, d_y: Tensor, d_end: Callable[[], State]) -> None:
            self.seq, self.d_end = rows.seq, d_end

        def gradients(self) -> RowGradients:
            weights, momentum, _ = self.d_end()
            pause(backward)
            seq = self.seq
            tokens = [torch.zeros_like(t) for t in (seq.q, seq.k, seq.v, seq.keep, seq.theta)]
            return RowGradients(
                [*tokens[:4], None, tokens[4]], [None, None], [w + 1 for w in weights], momentum, [], [], []
            )  # fmt: skip

    module: Any = wavefront
    real = module.forward_rows, module.RowsBackward
    module.forward_rows, module.RowsBackward = forward_rows, RowsBackward
    try:
        yield
    finally:
        module.forward_rows, module.RowsBackward = real


class Stack:
    """A rank's layers, and a training step of them."""

    def __init__(self, links: Any, layout: Row) -> None:
        from titans_train.parallel.shards import Shards, ShardSettings

        self.links, self.layout = links, layout
        settings = ShardSettings(length=1, pieces=layout["pieces"])
        self.across = [Shards(links, n, settings) for n in range(layout["layers"])]
        heads = layout["pieces"]
        self.x = torch.zeros(1, heads, 1, WIDTH, requires_grad=True)
        self.theta = torch.zeros(1, heads, 1)
        self.start = torch.zeros(1, heads, WIDTH, WIDTH, requires_grad=True)

    def forward(self) -> Tensor:
        layout, x = self.layout, self.x
        part = (1 - layout["share"]) / 2e3
        seconds = part * layout["forward_ms"], part * layout["backward_ms"]
        for shards in self.across:
            x = Beside.apply(x, *seconds) if part else x  # type: ignore[no-untyped-call]
            state = MemoryState((self.start,), ())
            x, end = shards.scan(x, x, x, None, None, self.theta, state, chunk_size=1)
            assert bool((end.weights[0] == self.links.shard + 1).all()), "a state that the neighbour did not send"
            x = Beside.apply(x, *seconds) if part else x  # type: ignore[no-untyped-call]
        return x.sum()

    def step(self) -> None:
        """Waves of micro-batches, each with one backward, as in training/step.py."""
        micro, wave = self.layout["micro_batches"], self.layout["wave"]
        self.start.grad = None
        for first in range(0, micro, wave):
            losses = [self.forward() for _ in range(first, min(first + wave, micro))]
            torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
            self.links.finish()
        owner = self.links.shard == 0
        wanted = micro * self.layout["layers"] * self.links.shards if owner else 0
        assert self.start.grad is not None
        assert bool((self.start.grad == wanted).all()), "a gradient that the neighbour did not send"


def latency(links: Any) -> float:
    """Seconds that a state takes from the first rank to the second, while the others wait. Collective."""
    from titans_train.parallel import gather
    from titans_train.parallel.links import Label

    state, found = [torch.zeros(1, WIDTH, WIDTH)], []
    dist.barrier()
    for n in range(100 if links.shards > 1 else 0):
        there, back = Label(0, "state", n), Label(0, "state", n, gradient=True)
        if links.shard == 0:
            links.expect("right", back, state)
            started = time.perf_counter()
            links.send("right", there, state)
            links.gradient(back, state)
            found.append((time.perf_counter() - started) / 2)
        elif links.shard == 1:
            links.receive("left", there, state)
            links.send("left", back, state)
    links.finish()
    median: float = gather(statistics.median(found) if found else 0.0)[0]
    return median


def waits(mesh: Any, layout: Row) -> Row:
    """Seconds of each repetition, and of the same on every rank at once without neighbours; a message's time."""
    from titans_train.parallel import Mesh, gather
    from titans_train.parallel.links import Links

    overshoot()
    links, nobody = Links(mesh), Links(Mesh(mesh.rank, mesh.world_size))
    piece = [layout["share"] * layout[k] / 1e3 / layout["pieces"] for k in ("forward_ms", "backward_ms")]
    stack, alone = Stack(links, layout), Stack(nobody, layout | {"micro_batches": 1, "wave": 1})
    with sleeping_scans(0.0, 0.0):
        stack.step()
    message = latency(links)
    with sleeping_scans(*piece):
        before = time.thread_time()  # without gloo's threads, which poll
        with OtherWork() as others:
            seconds = [together(stack.step) for _ in range(layout["repetitions"])]
        cpu = (time.thread_time() - before) / layout["repetitions"]
        by_itself = together(alone.step)
    return {
        "seconds": seconds, "makespan": statistics.median(seconds), "latency_us": 1e6 * message,
        "alone": layout["micro_batches"] * by_itself, "cpu": statistics.mean(gather(cpu)),
        "others": others.cores,
        "overshoot_us": [1e6 * late for late in gather(overshoot())],
    }  # fmt: skip


# ---- memory, long


def plan_of(layout: Row) -> Any:
    from titans_train.config import RunConfig
    from titans_train.plan import make_plan

    block, span = layout["block"], 4 * layout["chunk"]
    attention = {"mac": {"segment": span}, "lmm": {}}.get(block, {"window": min(span, layout["tokens"])})
    config: Row = {
        "run": {"name": "sequence"},
        "model": {key: layout[key] for key in ("block", "layers", "width", "heads", "vocabulary")},
        "memory": {"chunk_size": layout["chunk"]},
        "attention": attention,
        "parallel": {"sequence": layout["ranks"], "pieces": layout["pieces"], "zero_stage": layout["zero"]},
        "data": {"path": "unused"},
        "training": {
            "steps": layout["steps"], "sequence_length": layout["tokens"], "global_batch_size": 1,
            "micro_batch_size": 1, "activation_checkpointing": layout["checkpointing"],
        },
    }  # fmt: skip
    return make_plan(RunConfig.model_validate(config), layout["ranks"])


def batch(layout: Row) -> Any:
    """One sequence of random tokens, the whole of it, before it is cut for a shard."""
    from titans_train.data import Batch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, layout["vocabulary"], (1, layout["tokens"] + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), None, [])


def memory(mesh: Any, layout: Row) -> Row:
    """Bytes of tensors at the peak of a second training step, model, gradients, Adam and tokens included.

    ZeRO 0: nothing but the sequence is shared between the ranks, so that ranks cannot save anything by being more.
    fixed: of these, parameters, gradients and Adam's moments.
    """
    from titans_train.parallel import gather
    from titans_train.training.loop import build_engine
    from titans_train.training.step import own_share, train_step

    plan = plan_of(layout)
    with TensorMemory() as counted:
        engine = build_engine(plan, mesh)
        data: Any = own_share(batch(layout), engine.model.parts)  # type: ignore[arg-type]
        for _ in range(layout["steps"]):
            counted.reset_peak()
            train_step(engine, [data], 1e-3)
    peaks = gather(counted.peak)
    return {
        "peak": max(peaks), "peaks": peaks, "fixed": 4 * 4 * plan.parameter_count, "pieces_used": plan.sequence.pieces,
    }  # fmt: skip


def long(mesh: Any, layout: Row) -> Row:
    """Training steps on the same sequence. Tensors made before the first step are not counted (a model, small here)."""
    from titans_train.monitoring.throughput import peak_memory_bytes
    from titans_train.parallel import gather
    from titans_train.training.loop import build_engine
    from titans_train.training.step import own_share, train_step

    plan, counted = plan_of(layout), TensorMemory()
    engine = build_engine(plan, mesh)
    data: Any = own_share(batch(layout), engine.model.parts)  # type: ignore[arg-type]
    before, losses, seconds = peak_memory_bytes(), [], []
    for step in range(layout["steps"]):
        with counted if layout["counted"] and step == 0 else nullcontext():
            seconds.append(together(lambda: losses.append(train_step(engine, [data], 1e-3).loss())))
    return {
        "losses": losses, "seconds": seconds, "peaks": gather(counted.peak), "resident": gather(peak_memory_bytes()),
        "resident_before": gather(before), "parameters": plan.parameter_count,
        "strategy": plan.sequence.strategy, "pieces_used": plan.sequence.pieces,
    }  # fmt: skip
