"""What processes hold in /dev/shm: noted while they live, and removed when all of them were killed.

Python's resource tracker removes semaphores of a killed process, unless it was killed as well, with its whole group.
torch's shared tensors keep their names for a moment only, which a kill can meet.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

_FOLDER = Path("/dev/shm")
_TENSOR = re.compile(r"torch_(\d+)_\d+_\d+")


def listing() -> str:
    """Semaphores and process numbers of this process and all below it, for `remove`."""
    family = list(_family(os.getpid()))
    held = {inode for pid in family for inode in _mapped(pid)}
    return json.dumps({"semaphores": sorted(_semaphores(held)), "processes": family})


def remove(noted: str) -> int:
    """Remove what a `listing` of ended processes names and nobody uses; the number of files."""
    try:
        content = json.loads(noted)
        semaphores, makers = set(content["semaphores"]), {int(number) for number in content["processes"]}
    except (ValueError, KeyError, TypeError):
        return 0  # a note cut short
    used = {inode for pid in _processes() for inode in _mapped(pid)}
    removed = 0
    for path, info in _files():
        tensor = _TENSOR.fullmatch(path.name)
        ours = path.name in semaphores or (tensor is not None and int(tensor[1]) in makers)
        if ours and info.st_ino not in used and info.st_uid == os.getuid():
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    for path in _FOLDER.iterdir() if _FOLDER.is_dir() else ():
        with contextlib.suppress(OSError):
            yield path, path.stat()


def _semaphores(inodes: set[int]) -> Iterator[str]:
    """Names of Python's semaphores, which their makers know under other ones."""
    return (path.name for path, info in _files() if path.name.startswith("sem.mp-") and info.st_ino in inodes)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _family(ancestor: int) -> Iterator[int]:
    """A process and all below it."""
    parents = {}
    for pid in _processes():
        with contextlib.suppress(OSError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    yield ancestor
    found = {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
        yield from sorted(more)


def _mapped(pid: int) -> set[int]:
    """Inodes in /dev/shm that a process has mapped; none where it has ended or is another user's."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    fields = [line.split(maxsplit=5) for line in lines]  # addresses, rights, offset, device, inode, path
    return {int(line[4]) for line in fields if len(line) == 6 and line[5].startswith(f"{_FOLDER}/")}
