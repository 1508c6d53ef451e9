"""Reading what strangers may have written: bounded bytes of real files, and strict JSON. Standard library only."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def read_bounded(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    OSError: there is none, it cannot be read, it is larger, or it is a device or pipe, which might never end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe's opening would wait
    except ValueError as error:  # a NUL or half a surrogate pair in the name
        raise OSError(errno.EINVAL, f"no name of a file: {error}", str(path)) from error
    try:
        info = os.fstat(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        blocks, size, read = [b""], info.st_size, 0
        while size <= limit and (block := os.read(descriptor, 1 << 20)):  # at once, `limit` bytes would be taken
            blocks.append(block)
            read += len(block)
            size = max(size, read)
    finally:
        os.close(descriptor)
    if size > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes, the most that is read of it", str(path))
    return b"".join(blocks)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError: not JSON, not UTF-8, NaN or Infinity, a key twice, nested too deeply."""
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_each_once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:60]!r} is given twice")
        found[name] = value
    return found
