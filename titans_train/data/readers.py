"""Reader processes: started clean, waited for with a limit, and ended with the rank whatever happens to either."""

from __future__ import annotations

import atexit
import multiprocessing
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from queue import Empty, SimpleQueue
from typing import Any

import torch

from titans_train.data.errors import DataError
from titans_train.data.parent import end_with_parent, state_of
from titans_train.monitoring.signals import held_back

_ENDING_SECONDS = 5.0  # for reader processes to end by themselves
_abandoned: list[Any] = []


class Readers:
    """A DataLoader's reader processes, asked by a thread, so that whatever they do is waited for with a limit.

    torch's own limit does not hold: a batch that has come must still be fetched from the process that made it, and
    one that is stopped never answers.
    """

    def __init__(self, items: Any, limit: float) -> None:
        """`items`: the DataLoader's iterator, which nobody else may keep. `limit`: seconds for a step."""
        self._processes, self._limit = list(items._workers), limit
        self._asked: SimpleQueue[bool] = SimpleQueue()  # one step ahead; False: no more
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._failed = False
        # The processes end with the thread that started them: the caller, not this one.
        self._thread = threading.Thread(target=_answer, args=([items], self._asked, self._answers), daemon=True)
        self._thread.start()
        self._asked.put(True)
        atexit.register(self.end)  # runs before Python waits for the processes, which it does without a limit

    def next(self) -> Any:
        """An item. DataError: a reader has died, or no batch has come within the limit."""
        try:
            answer = self._answers.get(timeout=self._limit)
        except Empty:
            self._failed = True
            raise DataError(
                f"no batch for data.timeout_seconds {self._limit} ({self._states()}); is the storage of the data or of "
                "the cache hanging, or was a reader process stopped? If it is only slow, raise the limit or "
                "data.workers"
            ) from None
        if not isinstance(answer, Exception) or isinstance(answer, DataError):
            self._asked.put(True)
            return answer
        self._failed = True
        lost = isinstance(answer, ConnectionError | EOFError | FileNotFoundError)
        if "exited unexpectedly" not in str(answer) and (not lost or str(answer).startswith("Caught ")):
            raise answer  # "exited": torch's words for its readers; "Caught": for an error that one of them met
        raise DataError(
            f"a reader process ended ({answer}); was it killed, perhaps for memory? Lower data.workers or free "
            "memory, and start again: the run resumes from its last checkpoint"
        ) from answer

    def end(self) -> None:
        """End the processes: in peace, where all is well and it takes no longer than _ENDING_SECONDS."""
        if not self._failed:
            self._asked.put(False)
            self._thread.join(_ENDING_SECONDS)
        atexit.unregister(self.end)
        for process in self._processes:
            if process.is_alive():
                process.kill()

    def _states(self) -> str:
        names = {"T": "stopped", "t": "traced", "D": "waiting for a disk", "R": "running", "S": "waiting"}
        found = [f"{process.pid} is {names.get(state_of(process.pid), 'gone')}" for process in self._processes]
        return f"reader process {', '.join(found)}"


def _answer(kept: list[Any], asked: SimpleQueue[bool], answers: SimpleQueue[Any]) -> None:
    """Runs in the thread of Readers. Ending a DataLoader can hang where its processes failed, so then it is kept."""
    items = kept.pop()
    while asked.get():
        try:
            item = next(items)
        except StopIteration:
            return
        except Exception as error:
            _abandoned.append(items)
            item = error
        answers.put(item)
        del item


def worker_context() -> BaseContext:
    """Workers are forked from a clean process that has imported what they need once.

    Forking the rank itself would copy its communication threads' locks; spawning would import torch and streaming
    again in every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titans_train.data.preload"])
    return context


@contextmanager
def out_of_signals() -> Iterator[None]:
    """Reader processes that are started within, and what they are forked from, never see a request to stop.

    Such a signal often goes to every process of a job. Python's resource tracker, started with them, puts an end to
    holding back SIGTERM, so it is started first.
    """
    with held_back():
        resource_tracker.ensure_running()
        with held_back():
            yield


def start_worker(number: int) -> None:
    """Runs in each reader process."""
    end_with_parent()  # the process it was forked from, which ends with the rank
    torch.set_num_threads(1)
