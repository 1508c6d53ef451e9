"""Who is killed while data is prepared: a process that computes, not one of Python's helpers beside it."""

from __future__ import annotations

import sys
from pathlib import Path

from titans_train.benchmark.faults.job import Job
from titans_train.benchmark.faults.preparation import _victims

WORKS = """
import multiprocessing, time

def busy():
    while True:
        sum(range(10**6))

def idle():
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    workers = [context.Process(target=work, daemon=True) for work in (idle, busy, idle)]
    for worker in workers:
        worker.start()
    print("busy", workers[1].pid, flush=True)
    time.sleep(600)
"""


def test_a_worker_is_the_process_that_computes_whichever_way_it_was_started(tmp_path: Path) -> None:
    for method in ("forkserver", "spawn"):
        script, console = tmp_path / f"{method}.py", tmp_path / f"{method}.txt"
        script.write_text(WORKS.replace("{method}", method))
        job = Job([sys.executable, str(script)], console)
        try:
            assert job.wait_for(lambda job=job: job.says(r"busy \d+\n") and _victims(job, "a worker")[1] > 0.5)
            assert _victims(job, "a worker")[0] == [int(job.text().split()[1])], method
            assert _victims(job, "the main process")[0] == [job.process.pid]
            assert set(_victims(job, "all processes")[0]) == {process.pid for process in job.processes()}
        finally:
            job.kill()


def test_nobody_is_struck_where_no_worker_is_at_work(tmp_path: Path) -> None:
    job = Job([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "console.txt")
    try:
        assert _victims(job, "all processes") == ([], 0.0)
    finally:
        job.kill()
