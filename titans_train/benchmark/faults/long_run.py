"""Many tiny steps: what a run holds of memory, file handles, threads and shared memory does not grow."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from titans_train.benchmark.faults.job import Job, last_step, training
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.trial import Trial

_SAMPLES = 20
_MEMORY_GROWTH = 0.03  # of what it was after the warm-up; beyond, it is called growth


@dataclass(frozen=True)
class Held:
    """By all processes of a job but the launcher."""

    step: int
    memory_mib: float  # proportional: what processes share is counted once
    files: int
    threads: int
    processes: int
    shared_files: int  # in /dev/shm: the job's own one, where it can have one, else the machine's
    shared_mib: float


def held(job: Job, step: int) -> Held:
    memory = files = threads = count = 0
    for process in job.processes():
        place = Path(f"/proc/{process.pid}")
        if process.pid == job.process.pid:
            continue
        try:
            rollup = (place / "smaps_rollup").read_text()
            files += len(os.listdir(place / "fd"))
            threads += len(os.listdir(place / "task"))
        except OSError:  # it has just ended
            continue
        memory += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        count += 1
    shared = [entry.stat().st_size for entry in os.scandir(f"/proc/{job.process.pid}/root/dev/shm")]
    return Held(step, memory / 1024, files, threads, count, len(shared), sum(shared) / 2**20)


def _alone() -> list[str]:
    """Before a command: it has a /dev/shm of its own, so that other jobs of the machine are not counted."""
    apart = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
    tried = subprocess.run([*apart, "true"], capture_output=True) if shutil.which("unshare") else None
    return apart if tried is not None and tried.returncode == 0 else []


def long_run(lab: Lab) -> Iterator[Trial]:
    """One process and its reader; saved and validated now and then."""
    steps = lab.tiny_steps
    every = steps // _SAMPLES
    name = "long"
    # The readers keep up to 64 shards open: all of them within the warm-up; a quick run never gets to the second one.
    rows = 1 if lab.quick else 8
    settings = (
        f"run.name={name}", "model.block=lmm", "model.layers=1", "model.width=16", f"training.steps={steps}",
        "training.sequence_length=32", f"training.global_batch_size={rows}", f"training.micro_batch_size={rows}",
        f"checkpoint.every={every * 2}",
        f"monitoring.log_every={max(every // 10, 1)}", f"monitoring.validate_every={every * 2}",
        "monitoring.tensorboard=true",
    )  # fmt: skip
    run = lab.runs / name
    job = Job([*_alone(), *training(1, lab.config(), settings)], lab.consoles / f"{name}.txt")
    points = []
    for step in range(every, steps - every + 1, every):
        if not job.wait_for(lambda step=step: last_step(run) >= step, 1200):  # type: ignore[misc]
            break
        points.append(held(job, step))
    ended = job.wait_end(300)
    trial = judged(job, steps, points)
    if trial.survived and (not ended or last_step(run) != steps):
        note = f"{last_step(run):,} of {steps:,} steps were run" if ended else "processes were still there"
        trial = replace(trial, survived=False, note=note)
    yield trial


def judged(job: Job, steps: int, points: list[Held]) -> Trial:
    """Growth: the least of the last quarter is more than the most of the second. The first is the warm-up.

    So what comes and goes, as files of a save and messages under way, is none.
    """
    if job.status != 0 or len(points) < 8:
        return Trial(f"{steps:,} steps", False, note=f"ended with {job.status}: {job.complaint()}")
    quarter = len(points) // 4
    early, late = points[quarter : 2 * quarter], points[-quarter:]
    wrong, told = [], []
    for key in asdict(points[0]):
        if key == "step":
            continue
        first, last = (sorted(getattr(point, key) for point in some) for some in (early, late))
        told.append(f"{key} {median(first):,.4g} to {median(last):,.4g}")
        if last[0] > first[-1] * (1 + _MEMORY_GROWTH if key.endswith("mib") else 1):
            wrong.append(f"{key} grew")
    return Trial(f"{steps:,} steps: " + ", ".join(told), not wrong, note="; ".join(wrong))
