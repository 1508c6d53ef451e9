from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import closing

import pytest

from data_prep.errors import PrepareError
from data_prep.pool import Pool, advance, peak_memory
from data_prep.progress import Progress


def square(number: int) -> tuple[int, int]:
    advance(number, 1)
    return number * number, os.getpid()


def refuse(number: int) -> int:
    raise PrepareError(f"{number} cannot be")


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep(number: int) -> int:
    if number:
        time.sleep(1000)
    return os.getpid()


def pool(workers: int) -> tuple[Pool, list[tuple[int, int]]]:
    heard: list[tuple[int, int]] = []
    return Pool(workers, lambda text_bytes, tokens: heard.append((text_bytes, tokens))), heard


@pytest.mark.parametrize("workers", [1, 2])
def test_all_tasks_are_done_and_their_progress_is_heard(workers: int) -> None:
    runner, heard = pool(workers)
    results = list(runner.run(square, range(20)))
    assert sorted(result for result, _ in results) == [number * number for number in range(20)]
    assert (os.getpid() in {process for _, process in results}) == (workers == 1)
    assert (sum(size for size, _ in heard), sum(tokens for _, tokens in heard)) == (190, 20)
    assert 5e6 < runner.peak_bytes < 5e9


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_here(workers: int) -> None:
    with pytest.raises(PrepareError, match="cannot be"):
        list(pool(workers)[0].run(refuse, range(4)))


def test_a_worker_that_dies_is_explained() -> None:
    with pytest.raises(PrepareError, match=r"killed it for want of memory.*fewer --workers than 2"):
        list(pool(2)[0].run(die, range(4)))


def test_closing_ends_workers_in_the_middle_of_a_task() -> None:
    tasks: Sequence[int] = [0, 1, 1, 1]
    start = time.monotonic()
    with closing(pool(2)[0].run(sleep, tasks)) as results:
        worker = next(results)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_memory_is_measured_in_bytes() -> None:
    before = peak_memory()
    data = bytearray(200 << 20)
    assert peak_memory() - before > 100 << 20 or before > len(data)


def test_the_line_of_progress_names_phase_share_speed_tokens_and_time() -> None:
    progress = Progress(quiet=True)
    progress.begin("tokenise", total=100e6, done=20e6)
    progress.add(40e6, 1_234_567)
    assert progress.line(seconds=4) == "tokenise  60%  10.0 MB/s  1,234,567 tokens  0:00:04 left"


def test_the_queues_of_workers_are_noted_when_they_exist() -> None:
    noted: list[bool] = []
    for workers in (1, 2):
        assert (
            len(list(Pool(workers, lambda text_bytes, tokens: None, lambda: noted.append(True)).run(square, [1, 2])))
            == 2
        )
    assert noted == [True]
