"""Preparing data, killed at any moment: the same command goes on and writes the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from titans_train.benchmark.faults.job import POLL_SECONDS, Job
from titans_train.benchmark.faults.lab import Lab, dice
from titans_train.benchmark.faults.trial import Trial

_MEGABYTES = 8
_MOMENTS = 4  # of a trial, until one comes while there is work


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
    for seed in range(2 if lab.quick else 8):
        victims = ("a worker", "the main process", "all processes")[seed % 3]
        yield lab.attempt(victims, partial(_killed, lab, seed, victims, texts, folder, whole, most))
    shutil.rmtree(folder)


def _killed(lab: Lab, seed: int, victims: str, texts: Path, folder: Path, whole: dict[str, bytes], most: int) -> Trial:
    """RuntimeError: whenever the kill came, the work was already done."""
    chance = dice("preparation", seed)
    for moment in range(_MOMENTS):
        share, output = chance.uniform(0.05, 0.95), folder / f"out-{seed}-{moment}"
        job = Job(_command(texts, output), lab.consoles / f"prepare-{seed}-{moment}.txt")
        try:
            job.wait_for(lambda output=output, share=share: _progress(output) >= share * most)  # type: ignore[misc]
            pids, worked = _victims(job, victims)
            since = job.signal(signal.SIGKILL, *pids)
            ended = job.wait_end()
            seconds = time.monotonic() - since
        finally:
            job.kill()
        if pids and job.status != 0:
            case = f"{victims} at {share:.0%} of the work; the worker had used {worked:.1f} s of CPU time"
            return _outcome(job, case, ended, seconds, texts, output, whole)
    raise RuntimeError(f"the kill came too late in {_MOMENTS} tries: no process worked any more")


def _victims(job: Job, who: str) -> tuple[list[int], float]:
    """(processes to be killed, CPU seconds of the worker that has used most); none, where no worker is at work.

    Python's own helpers, the resource tracker and the server that workers are forked from, are no workers.
    """
    every = job.processes()
    command = {p.pid: _read(p.pid, "cmdline") for p in every}
    servers = {p.pid for p in every if "forkserver" in command[p.pid] and p.parent == job.process.pid}
    workers = {p.pid: _cpu(p.pid) for p in every if p.parent in servers or "spawn_main" in command[p.pid]}
    busiest = max(workers, key=lambda pid: workers[pid], default=0)
    if not workers or workers[busiest] == 0:
        return [], 0.0
    main, all_of_it = [job.process.pid], [p.pid for p in every]
    return {"a worker": [busiest], "the main process": main, "all processes": all_of_it}[who], workers[busiest]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it has just ended
        return ""


def _cpu(pid: int) -> float:
    """Seconds that a process has computed for."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


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


def _outcome(
    job: Job, case: str, ended: bool, seconds: float, texts: Path, output: Path, whole: dict[str, bytes]
) -> Trial:
    wrong = [] if ended else ["processes stayed"]
    if output.exists() and _bytes(output) != whole:
        wrong.append("a half output was there under its final name")
    again = Job(_command(texts, output), job.console)
    if not again.wait_end() or again.status != 0:
        wrong.append(f"started again, it ended with {again.status}: {again.complaint()}")
    elif _bytes(output) != whole:
        wrong.append("other bytes than without the kill")
    return Trial(case, not wrong, None, seconds, "; ".join(wrong))
