"""Jobs are watched and struck from outside: their processes are found, ended, and told apart by rank."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from titans_train.benchmark.faults.job import LAUNCHER, Job

SLEEPS = "import time; print('here', flush=True); time.sleep(600)"


def launched(console: Path, ranks: int, code: str) -> Job:
    return Job([sys.executable, str(LAUNCHER), "--processes", str(ranks), "--", sys.executable, "-c", code], console)


def test_ranks_are_found_by_their_number_and_a_killed_one_ends_the_job(tmp_path: Path) -> None:
    job = launched(tmp_path / "console.txt", 2, SLEEPS)
    assert job.wait_for(lambda: len(job.ranks()) == 2 and job.text().count("here") == 2)
    ranks = job.ranks()
    assert set(ranks) == {0, 1} and set(ranks.values()) < {process.pid for process in job.processes()}
    since = job.signal(signal.SIGKILL, ranks[1])
    assert job.wait_end(60) and job.status == 137 and since < time.monotonic()
    assert f"rank 1 (pid {ranks[1]})" in job.complaint() or job.says(f"rank 1 .pid {ranks[1]}")


def test_a_frozen_process_ends_with_kill(tmp_path: Path) -> None:
    job = launched(tmp_path / "console.txt", 1, SLEEPS)
    assert job.wait_for(lambda: job.says("here"))
    job.signal(signal.SIGSTOP, job.process.pid, *job.ranks().values())
    job.kill()
    assert job.processes() == [] and job.status == 137


def test_waiting_ends_with_the_job(tmp_path: Path) -> None:
    job = Job([sys.executable, "-c", "print('step 7/9  loss'); print('step 8/9  loss')"], tmp_path / "console.txt")
    assert not job.wait_for(lambda: False, 60)
    assert job.wait_end() and job.status == 0 and job.resumed_from() == 6
