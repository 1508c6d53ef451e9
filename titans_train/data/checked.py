"""Does a file agree with the manifest? Hashed once; a marker file remembers it for as long as the file is unchanged."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from pathlib import Path

from data_prep.manifest import FileEntry, describe_file
from titans_train.data.cache import Cache, boot, host_name

_TOUCH_SECONDS = 60.0  # a marker's time says when its file was last used, to within this
_SETTLED_SECONDS = 0.1  # times of files are this coarse, at worst


def remembered(path: Path, file: FileEntry, marker: Path) -> bool:
    """Whether `marker` says that the file at `path` is as the manifest says, and it is unchanged since.

    A marker of this host is good until it starts again: what was written before a power cut may have been lost in it.
    """
    try:
        content = json.loads(marker.read_text("utf-8"))
        here = content["host"] == host_name()
        if content["state"] != _state(path, file) or (here and content["boot"] != boot()):
            return False
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    touch(marker)
    return True


def problem(path: Path, file: FileEntry, marker: Path, cache: Cache) -> str | None:
    """What is wrong with the file at `path`; None when it is as the manifest says, which `marker` then remembers."""
    if remembered(path, file, marker):
        return None
    try:
        state, changed = _state(path, file), path.stat().st_ctime
    except OSError:
        return difference(path, file)
    fresh = time.time() - changed < _SETTLED_SECONDS
    if (found := difference(path, file)) is not None:
        return found
    if not fresh or path.parent == marker.parent:  # nobody else writes to the cache
        _remember(marker, {"state": state, "host": host_name(), "boot": boot()}, cache)
    return None


def _remember(marker: Path, content: dict[str, object], cache: Cache) -> None:
    """Without a marker, as on a full disk, the next process checks again."""
    temporary = cache.temporary(marker)
    try:
        temporary.write_text(json.dumps(content), "utf-8")
        os.replace(temporary, marker)
    except OSError:
        temporary.unlink(missing_ok=True)


def touch(marker: Path) -> None:
    """Note that the marker's file is in use."""
    with contextlib.suppress(OSError):
        if time.time() - marker.stat().st_mtime > _TOUCH_SECONDS:
            os.utime(marker)


def difference(path: Path, file: FileEntry) -> str | None:
    """What is wrong with a file, None when size and hash are as the manifest says."""
    try:
        if (found := wrong_size(path, file)) is not None:
            return found
        content = describe_file(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if content.xxh64 == file.xxh64 else f"is damaged: xxh64 {content.xxh64}, expected {file.xxh64}"


def wrong_size(path: Path, file: FileEntry) -> str | None:
    """Why a file need not be read: it is a device or pipe, or has another size. OSError: it cannot be looked at."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file"
    return None if info.st_size == file.bytes else f"has {info.st_size} bytes, expected {file.bytes}"


def _state(path: Path, file: FileEntry) -> list[int | str]:
    """Changes when the file was written to or replaced, even where its modification time was put back."""
    info = path.stat()
    return [file.xxh64, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]
