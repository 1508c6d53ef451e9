"""Files that are whole or absent, also after a kill or a power cut: written beside, flushed, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

TEMPORARY = ".writing"  # suffix; several processes may write the same file, each its own copy


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes `path` when the block ends without an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as stream:
        stream.write(json.dumps(value, sort_keys=True).encode("utf-8"))


def read_json(path: Path) -> Any:
    """The value, or None where there is no such file or it is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def has_bytes(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def flush_folder(folder: Path) -> None:
    """After a power cut a rename may have survived the content; so the content of `folder` goes to the disk first.

    For a folder whose whole content this program wrote; in any other, flush_directory.
    """
    for path in [*folder.rglob("*"), folder]:
        flush_directory(path)


def flush_directory(path: Path) -> None:
    """The names in a directory go to the disk, as after a rename into it; not what they name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
