"""The open shards of this process: the most recently used ones, of all stores together."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from titans_train.data.checked import touch
from titans_train.data.mds import MdsFile

LARGEST = 64  # descriptors
_NOTED_SECONDS = 60.0


@dataclass
class _Open:
    file: MdsFile
    marker: Path  # its time tells other processes that the file is in use, and is noted once in a while
    noted: float  # when, in monotonic seconds


Key = tuple[str, int]

_open: OrderedDict[Key, _Open] = OrderedDict()
_lock = threading.Lock()


def opened(key: Key, make: Callable[[], tuple[MdsFile, Path]]) -> MdsFile:
    """The open file `key`. `make` gives it and its marker, where it is not open yet.

    A file is closed when nobody reads it any more.
    """
    now = time.monotonic()
    with _lock:
        if (entry := _open.get(key)) is not None:
            _open.move_to_end(key)
            if now - entry.noted < _NOTED_SECONDS:
                return entry.file
            entry.noted = now
    if entry is not None:
        touch(entry.marker)
        return entry.file
    file, marker = make()
    with _lock:
        _open[key] = _Open(file, marker, now)
        _close_some(key)
    return file


def close(key: Key) -> None:
    """Forget `key`: its file has changed."""
    with _lock:
        _open.pop(key, None)


def _close_some(newest: Key) -> None:
    """Those that are too many, and those that were removed from the cache: the disk gets their bytes back with that."""
    for key in [key for key, entry in _open.items() if key != newest and entry.file.removed()]:
        del _open[key]
    while len(_open) > LARGEST:
        _open.popitem(last=False)
