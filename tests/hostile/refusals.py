"""What every refusal must be, and the things that strangers put in place of good files."""

from __future__ import annotations

import os
import pickle
import resource
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from titans_train.__main__ import main

DEEP = "[" * 100_000
Change = Callable[[dict[str, Any]], object]


def put(*path: str | int) -> Callable[[object], Change]:
    """Puts a value to a place of a manifest."""

    def make(value: object) -> Change:
        def change(data: dict[str, Any]) -> None:
            place: Any = data
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return change

    return make


class Bomb:
    """Unpickling one makes the file `BOMB`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Bomb(mark))


def zipped(content: bytes) -> bytes:
    """As torch.save and numpy.savez write: an archive with a pickle in it."""
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("a.npy", content)
    return stream.getvalue()


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Path -> (bytes, time of change) of all that lies in a folder."""
    found = sorted(folder.rglob("*"))
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What stands on stderr: exit status 2, no traceback (the verb has returned), no result, nothing endless."""
    capsys.readouterr()
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err and len(captured.err) < 20_000
    assert all(line.isprintable() for line in captured.err.splitlines())
    return captured.err


@contextmanager
def little_memory(more: int = 512 << 20) -> Iterator[None]:
    """Within, this process cannot take `more` bytes of address space beyond what it has: a bomb is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
