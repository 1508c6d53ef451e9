"""Preparing data, killed at any moment: the same command goes on and writes the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from titans_train.benchmark.faults.job import POLL_SECONDS, Job
from titans_train.benchmark.faults.lab import Lab, dice
from titans_train.benchmark.faults.trial import Trial

_MEGABYTES = 8


def _command(texts: Path, output: Path) -> list[str]:
    options = ["--shard-size", "256kb", "--workers", "2"]
    return [sys.executable, "-m", "data_prep", "--input", str(texts), "--output", str(output), *options]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def preparation(lab: Lab) -> Iterator[Trial]:
    """The main process, one of its workers or all of them, killed at a random moment."""
    from titans_train.benchmark.data import write_pieces

    folder = lab.folder / "preparing"
    folder.mkdir()
    texts = folder / "texts.jsonl"
    write_pieces(texts, (2 if lab.quick else _MEGABYTES) << 20)
    whole, most = _uninterrupted(lab, texts, folder / "whole")
    for seed in range(1 if lab.quick else 8):
        chance, output = dice("preparation", seed), folder / f"out-{seed}"
        job, share = Job(_command(texts, output), lab.consoles / f"prepare-{seed}.txt"), chance.uniform(0.05, 0.95)
        job.wait_for(lambda output=output, share=share: _progress(output) >= share * most)  # type: ignore[misc]
        victims = ("the main process", "a worker", "all processes")[seed % 3]
        workers = [p.pid for p in job.processes() if p.parent == job.process.pid]
        main = [job.process.pid]
        pids = {"the main process": main, "a worker": workers[-1:], "all processes": [*main, *workers]}[victims]
        since = job.signal(signal.SIGKILL, *pids)
        yield _outcome(lab, job, f"{victims} at {share:.0%} of the work", since, texts, output, whole)
    shutil.rmtree(folder)


def _progress(output: Path) -> int:
    """Files of unfinished work."""
    return sum(len(files) for _, _, files in os.walk(output.with_name(f".{output.name}.partial")))


def _uninterrupted(lab: Lab, texts: Path, output: Path) -> tuple[dict[str, bytes], int]:
    """What it writes, and the most files that it has on the way."""
    job, most = Job(_command(texts, output), lab.consoles / "prepare-whole.txt"), 0
    while job.status is None:
        most = max(most, _progress(output))
        time.sleep(POLL_SECONDS)
    if not job.wait_end() or job.status != 0:
        raise RuntimeError(f"preparing failed:\n{job.text()[-2000:]}")
    return _bytes(output), most


def _outcome(lab: Lab, job: Job, case: str, since: float, texts: Path, output: Path, whole: dict[str, bytes]) -> Trial:
    wrong = [] if job.wait_end() else ["processes stayed"]
    seconds = time.monotonic() - since
    if output.exists():
        case += ", finished before" if job.status == 0 else ""
        if _bytes(output) != whole:
            wrong.append("a half output was there under its final name")
    if job.status != 0:
        again = Job(_command(texts, output), job.console)
        if not again.wait_end() or again.status != 0:
            wrong.append(f"started again, it ended with {again.status}: {again.complaint()}")
        elif _bytes(output) != whole:
            wrong.append("other bytes than without the kill")
    return Trial(case, not wrong, None, seconds, "; ".join(wrong))
