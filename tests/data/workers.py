"""What the processes of the cache's tests do."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tests.data.corpus import run_config
from tests.data.folders import QUICK, read_all
from titans_train.data import DataError, loader, open_dataset
from titans_train.data.cache import Cache, note_shared_memory
from titans_train.data.readers import start_worker, worker_context
from titans_train.data.shards import ShardStore
from titans_train.data.shared_memory import listing
from titans_train.plan import make_plan

NOBODY = 65534


def processes() -> BaseContext:
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.data.workers"])
    return context


def result(answers: Any, action: Callable[..., object], *args: object) -> None:
    """Put what `action` returns, or the text of its error, into a queue."""
    try:
        answers.put(action(*args))
    except Exception as error:
        answers.put(f"{type(error).__name__}: {error}")


def read_again_and_again(path: Path, cache: Cache, rounds: int) -> list[list[int]]:
    """All tokens, which must be the same in each round; each round opens what was removed in between."""
    found: list[list[int]] | None = None
    for number in range(rounds):
        store = ShardStore(str(path), "train", Cache(cache.root / ".." / cache.root.name, cache.limit), None, QUICK)
        store._identity += f"/{number}"  # as of a new process
        read = read_all(store)
        assert found is None or read == found
        found = read
    assert found is not None
    return found


def open_at_once(path: Path, cache: Cache, together: Any) -> int:
    """The inode of the first shard's raw form, opened by all processes at the same time."""
    store = ShardStore(str(path), "train", cache, None, QUICK)
    together.wait()
    store.tokens(0, 0, 1)
    (raw,) = cache.folder.glob("*/train/text/shard.00000.mds")
    return raw.stat().st_ino


def as_user(user: int, action: Callable[..., object], *args: object) -> object:
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    return action(*args)


def read_as(path: Path, cache: Cache) -> tuple[int, list[list[int]]]:
    """(files removed at the start, all tokens)."""
    return cache.clean(), read_all(ShardStore(str(path), "train", cache, None, QUICK))


def write_half(cache: Cache, started: Any) -> None:
    """Be in the middle of making a shard, until killed."""
    target = cache.folder / "data" / "shard.00000.mds"
    with cache.lock("shard"), cache.room(1000):
        cache.temporary(target).write_bytes(b"half")
        started.set()
        time.sleep(600)


def hold_locks(cache: Cache, names: list[str], held: Any) -> None:
    """Until killed."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(cache._lock_file(name))
        held.set()
        time.sleep(600)


def hold_shared_memory(temporary: str) -> None:
    """Have semaphores that processes share, as a DataLoader has; say their names, and wait to be killed."""
    context = multiprocessing.get_context("spawn")
    held = (context.Queue(), context.Event())
    tempfile.tempdir = temporary
    note_shared_memory()
    print(*json.loads(listing())["semaphores"], flush=True)
    time.sleep(600)
    del held


def meet_a_stopped_reader(prepared: str, runs: str, ending: str) -> None:
    """Read with two reader processes, one of which is stopped while its batches are queued; then go on, or end."""
    config = run_config(Path(prepared), Path(runs), workers=2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"timeout_seconds": 8})})
    reading = loader(open_dataset(config), make_plan(config, 1))
    next(reading)
    time.sleep(2)
    stopped = multiprocessing.active_children()[0].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    try:
        if ending == "go on":
            list(reading)
        reading.close()  # type: ignore[attr-defined]
    except DataError as error:
        print(str(error).replace(f"{stopped} is stopped", "it is stopped"))
    print(f"{time.monotonic() - began:.1f}")


def fail_to_start_readers(prepared: str, runs: str) -> None:
    """Where the process that readers are forked from ends at once."""
    multiprocessing.set_executable("/bin/false")
    config = run_config(Path(prepared), Path(runs), workers=2)
    try:
        next(loader(open_dataset(config), make_plan(config, 1)))
    except DataError as error:
        print(error)


def slow_reader() -> None:
    time.sleep(2)  # as unpickling a large dataset
    start_worker(0)
    time.sleep(300)


def start_a_slow_reader() -> None:
    worker_context().Process(target=slow_reader).start()
