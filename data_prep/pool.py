"""Tasks in worker processes that end with the main process, however it ends.

Each worker holds the reading end of a pipe whose only writing end is in the main process. When that closes, by a kill
as well as on purpose, the worker ends itself at once, in the middle of its task.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import PrepareError

Task = TypeVar("Task")
Result = TypeVar("Result")
Listener = Callable[[int, int], None]  # (text bytes, tokens) finished since the last call

_COUNTS = struct.Struct("<QQ")
_POLL_SECONDS = 0.5
_SIGNALS = {signal.SIGINT, signal.SIGTERM}  # the main process hears them and ends the workers

_send: Listener = lambda text_bytes, tokens: None  # noqa: E731  set where tasks run


def advance(text_bytes: int, tokens: int) -> None:
    """Called by a task now and then: what it has done since its last call."""
    _send(text_bytes, tokens)


@dataclass
class Pool:
    """Runs picklable functions over picklable tasks. With one worker all happens in this process."""

    workers: int
    listen: Listener
    note: Callable[[], None] = lambda: None  # called when the workers' queues exist, which a kill would leave
    peak_bytes: int = 0  # resident memory of the largest worker so far
    cpu: dict[int, float] = field(default_factory=dict)  # process -> CPU seconds of its tasks, starting included

    def run(
        self,
        function: Callable[[Task], Result],
        tasks: Sequence[Task],
        preload: str | None = None,
    ) -> Generator[Result, None, None]:
        """Results as they are finished, in any order. Close the iterator to end the workers.

        `preload` names a module that takes long to import: it is imported once, and workers are forked from there.
        An error of a task is raised here; PrepareError when a worker dies.
        """
        workers = min(self.workers, len(tasks))
        if workers <= 1:
            yield from self._run_here(function, tasks)
            return
        context: Any = multiprocessing.get_context("spawn" if preload is None else "forkserver")
        if preload is not None:
            self.warm(preload)
        life, held = context.Pipe(duplex=False)
        counts, counter = context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(workers, context, _begin, (life, counter))
        try:
            self.note()
            for result, cost in _in_flight(executor, function, tasks, 2 * workers, lambda: self._drain(counts)):
                self.peak_bytes = max(self.peak_bytes, cost.peak_bytes)
                self.cpu[cost.process] = cost.cpu_seconds
                yield result
        except BrokenProcessPool as error:
            raise PrepareError(
                "a worker process ended by itself; most likely the system killed it for want of memory. Run the same "
                f"command again with fewer --workers than {workers} or a smaller --max-document-size"
            ) from error
        finally:
            held.close()
            executor.shutdown(wait=True, cancel_futures=True)
            for connection in (life, counts, counter):
                connection.close()

    def warm(self, preload: str) -> None:
        """Begin to import `preload`, in a process of its own, for a later run()."""
        if self.workers > 1:
            multiprocessing.set_forkserver_preload([preload])
            with _signals_held_back():
                forkserver.ensure_running()

    def _run_here(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        global _send
        before, _send = _send, self.listen
        try:
            for task in tasks:
                yield function(task)
            self.peak_bytes = max(self.peak_bytes, peak_memory())
        finally:
            _send = before

    def _drain(self, counts: Connection) -> None:
        while counts.poll():
            self.listen(*_COUNTS.unpack(counts.recv_bytes()))
        self.listen(0, 0)  # time goes on


def _in_flight(
    executor: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task], limit: int,
    drain: Callable[[], None],
) -> Iterator[tuple[Result, _Cost]]:  # fmt: skip
    """Keeps `limit` tasks handed out, so that what is queued stays small and ends soon when it is not wanted."""
    left = iter(tasks)
    pending: set[Future[tuple[Result, _Cost]]] = set()
    while True:
        with _signals_held_back():  # inherited by the workers that `submit` starts
            for task in itertools.islice(left, limit - len(pending)):
                pending.add(executor.submit(_measured, function, task))
        if not pending:
            return
        done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        drain()
        for future in done:
            yield future.result()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    resource_tracker.ensure_running()  # which lets the signals through again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(life: Connection, counter: Connection) -> None:
    """First thing in a worker."""
    global _send
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker: the workers are the parallelism
    threading.Thread(target=_end_with, args=(life,), daemon=True).start()
    # One message is one write of less than a page, which no other worker's can tear.
    _send = lambda text_bytes, tokens: counter.send_bytes(_COUNTS.pack(text_bytes, tokens))  # noqa: E731


def _end_with(life: Connection) -> None:
    life.poll(None)  # nothing is ever sent: this returns when the writing end is closed
    os._exit(1)


@dataclass(frozen=True)
class _Cost:
    """Of a worker process so far."""

    process: int
    cpu_seconds: float
    peak_bytes: int


def _measured(function: Callable[[Task], Result], task: Task) -> tuple[Result, _Cost]:
    return function(task), _Cost(os.getpid(), time.process_time(), peak_memory())


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage also counts what the process was before it became this program
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
