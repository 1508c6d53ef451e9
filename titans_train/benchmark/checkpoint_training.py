"""Training steps beside saves: what a run loses, the slowdown while a thread writes included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch.distributed as dist

from titans_train.benchmark.checkpoint_state import plan_of
from titans_train.benchmark.sequence_worker import OtherWork
from titans_train.data import loader, open_dataset
from titans_train.parallel import Engine, gather, mesh_of
from titans_train.plan import Plan
from titans_train.training.checkpoint_saver import Saver
from titans_train.training.decisions import decide
from titans_train.training.loop import build_engine
from titans_train.training.progress import Progress
from titans_train.training.step import train_step

MODES = ("none", "synchronous", "asynchronous")
RATE = 1e-4
Row = dict[str, Any]


def training(job: Row, layout: Row) -> list[Row]:
    """A row for each mode: medians over rounds, in which the modes take turns. Collective."""
    with mesh_of(layout["tensor"]) as mesh:
        plans = {
            mode: plan_of(
                job, layout["tensor"], layout["zero"], mesh.world_size, f"training-{mode}", mode != "synchronous"
            )
            for mode in MODES
        }
        plan = plans["none"]
        engine, data = build_engine(plan, mesh), open_dataset(plan.config, "train", plan.shape.document_alignment)
        start = Progress.start(plan)
        batches = loader(data, plan, mesh.data_rank, 0, start.cursor, mesh.sequence_rank)
        savers = {m: Saver(engine, plans[m], data, mesh, None, print) for m in MODES if m != "none"}
        loops: dict[str, list[Row]] = {mode: [] for mode in MODES}
        for number in range(job["loops"] + 1):
            for mode in MODES:
                steps = job["every"] if number == 0 else job["steps"]  # a first save takes its memory
                first = number * job["steps"]
                with OtherWork() as others:
                    row = loop(engine, batches, savers.get(mode), plans[mode], first, steps, job["every"])
                loops[mode].append(row | {"others": others.cores})
        return [
            {**layout, "ranks": mesh.world_size, "mode": mode, "steps": job["steps"], "every": job["every"]}
            | _medians(rows[1:])
            for mode, rows in loops.items()
        ]


def loop(
    engine: Engine, batches: Iterator[Any], saver: Saver | None, plan: Plan, first: int, steps: int, every: int
) -> Row:
    """Seconds of `steps` steps, as training/loop.py takes them, with a save after every `every`-th of them."""
    seconds: dict[str, list[float]] = {"saving": [], "beside": [], "alone": []}
    blocked, took = [], []
    saved = begun = 0 if saver is None else saver.saved_step
    dist.barrier()
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(first + 1, first + steps + 1):
        began = time.perf_counter()
        under_way = saver is not None and saver.saved_step < begun
        train_step(engine, next(batches), RATE).loss()
        saves = saver is not None and (step - first) % every == 0
        if saver is not None and saves:
            saver.save(Progress(step, Progress.start(plan).cursor))
            begun = step
            blocked.append(saver.blocked_seconds)
        decision = decide({"saving": 0.0, "unsaved": 0.0} | ({} if saver is None else saver.wishes()))
        if saver is not None:
            saver.follow(decision)
            if saver.saved_step != saved:
                took.append(saver.seconds)
                saved = saver.saved_step
        seconds["saving" if saves else "beside" if under_way else "alone"].append(time.perf_counter() - began)
    trained = time.perf_counter() - started
    if saver is not None:
        saver.finish()
    left = time.perf_counter() - started - trained
    return {
        "step": _median(seconds["alone"]), "step_beside": _median(seconds["beside"]),
        "saving_step": _median(seconds["saving"]), "blocked": _median(blocked), "save": _median(took),
        "mean": trained / steps, "left": left, "cpu": sum(gather(time.process_time() - cpu)) / steps,
    }  # fmt: skip


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _medians(rows: list[Row]) -> Row:
    return {key: _median([row[key] for row in rows if row[key] is not None]) for key in rows[0]}
