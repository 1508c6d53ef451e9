"""What each process of `benchmark checkpoint` does. Wall times are from a barrier to the last rank's end."""

from __future__ import annotations

import ctypes
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from titans_train.benchmark.checkpoint_peers import MECHANISMS, Mechanism
from titans_train.benchmark.checkpoint_state import Known, plan_of
from titans_train.benchmark.checkpoint_training import training
from titans_train.benchmark.sequence_worker import OtherWork, patiently
from titans_train.data import open_dataset
from titans_train.parallel import Engine, Mesh, gather, mesh_of, process_group
from titans_train.parallel.pieces import KINDS
from titans_train.training.loop import build_engine

Row = dict[str, Any]


class PeakMemory:
    """Resident memory of this process above what it was at the start."""

    def __init__(self) -> None:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the mechanism before has freed is not there for this one to use
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is resident now
        self.before = self._read("VmRSS")

    def more(self) -> int:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(key: str) -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024


def saved(mechanism: Mechanism, rounds: int) -> Row:
    """Medians of `rounds` saves, after one that is not timed; of the slowest rank, CPU of all. Collective.

    blocked_cpu: CPU seconds of a rank while training waits (of its main thread, where another one goes on).
    """
    clock, found = time.thread_time if mechanism.asynchronous else time.process_time, []
    for number in range(mechanism.last + 1, mechanism.last + rounds + 2):
        dist.barrier()
        started, cpu, own = time.perf_counter(), time.process_time(), clock()
        mechanism.save(number)
        blocked, blocked_cpu = time.perf_counter() - started, clock() - own
        mechanism.finish()
        complete, spent = time.perf_counter() - started, time.process_time() - cpu
        found.append((max(gather(blocked)), max(gather(blocked_cpu)), max(gather(complete)), sum(gather(spent))))
        mechanism.clear()
    keys = ("blocked", "blocked_cpu", "complete", "cpu")
    return {key: median(column) for key, column in zip(keys, zip(*found[1:], strict=True), strict=True)}


def loaded(mechanism: Mechanism, known: Known, rounds: int) -> Row:
    """Medians of loads, and how far what they gave is from what was saved. Collective."""
    found, apart = [], 0.0
    for _ in range(rounds):
        known.forget()
        dist.barrier()
        started, cpu = time.perf_counter(), time.process_time()
        mechanism.load()
        seconds, spent = time.perf_counter() - started, time.process_time() - cpu
        found.append((max(gather(seconds)), sum(gather(spent))))
        apart = max(apart, known.difference())
    seconds, spent = (median(column) for column in zip(*found, strict=True))
    return {"load": seconds, "load_cpu": spent, "difference": apart}


def measured(mechanism: Mechanism, known: Known, job: Row, saving: bool) -> Row:
    """Saves, if asked to, and loads; again while other programs were busy, for at most job["patience"] seconds.

    extra_memory: of the first rank, at the peak of the first saves.
    """
    memory = PeakMemory()
    rows: list[Row] = []

    def once() -> Row:
        with OtherWork() as others:
            figures = saved(mechanism, job["rounds"]) if saving else {}
            more = memory.more()
            figures |= loaded(mechanism, known, job["rounds"])
        rows.append(figures | {"others": others.cores, "extra_memory": more})
        return rows[-1]

    best = patiently(once, job["patience"])
    worst = max(row["difference"] for row in rows)  # none is forgiven
    return best | {"difference": worst, "extra_memory": rows[0]["extra_memory"]}


def saves(job: Row, layout: Row) -> list[Row]:
    """Every mechanism saves on the layout and loads there; then each that can loads on the other layout."""
    rows = []
    with mesh_of(layout["tensor"]) as mesh:
        engine, known = _begin(job, layout["tensor"], layout["zero"], mesh)
        for name in job["mechanisms"]:
            known.set()
            mechanism = _mechanism(name, job, engine, mesh, layout["tensor"], layout["zero"])
            figures = measured(mechanism, known, job, saving=True)
            size = sum(path.stat().st_size for path in mechanism.path().rglob("*") if path.is_file())
            mechanism.close()
            parameters = mechanism.plan.parameter_count
            rows.append({
                **layout, "ranks": mesh.world_size, "mechanism": name, **figures, "bytes": size,
                "hashes": mechanism.hashes, "unpickles": mechanism.unpickles,
                "last": mechanism.last, "parameters": parameters, "state": 4 * len(KINDS) * parameters,
            })  # fmt: skip
        del mechanism, engine, known
    with mesh_of(layout["other_tensor"]) as mesh:
        engine, known = _begin(job, layout["other_tensor"], layout["other_zero"], mesh)
        for row in rows:
            figures = {}
            if MECHANISMS[row["mechanism"]].any_layout:
                mechanism = _mechanism(
                    row["mechanism"], job, engine, mesh, layout["other_tensor"], layout["other_zero"]
                )
                mechanism.last = row["last"]
                figures = measured(mechanism, known, job, saving=False)
                mechanism.close()
            row |= {f"{key}_other": figures.get(key) for key in ("load", "load_cpu", "difference", "others")}
    return rows


def _begin(job: Row, tensor: int, zero: int, mesh: Mesh) -> tuple[Engine, Known]:
    engine = build_engine(plan_of(job, tensor, zero, mesh.world_size, "engine"), mesh)
    return engine, Known(engine)


def _mechanism(name: str, job: Row, engine: Engine, mesh: Mesh, tensor: int, zero: int) -> Mechanism:
    kind = MECHANISMS[name]
    plan = plan_of(job, tensor, zero, mesh.world_size, name, kind.asynchronous)
    return kind(engine, mesh, plan, open_dataset(plan.config, "train", plan.shape.document_alignment))


def work(job_file: Path) -> None:
    """Reads what to measure from the file, and writes the rows to it."""
    job, rows = json.loads(job_file.read_text()), []
    with process_group() as whole:
        for layout in job["layouts"]:
            rows += training(job, layout) if job["part"] == "training" else saves(job, layout)
        if whole.is_first:
            job_file.write_text(json.dumps(rows))
