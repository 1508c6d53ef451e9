"""What can happen to a file on a disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def flip(path: Path, place: float = 0.5) -> None:
    """One bit of the byte at this part of the file, in place: readers that have it open see it."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(min(int(size * place), size - 1))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def flip_all(path: Path, start: float = 0.1) -> None:
    """One bit of every byte from this part of the file on: no reader of its later samples can miss it."""
    content = bytearray(path.read_bytes())
    first = int(len(content) * start)
    content[first:] = bytes(byte ^ 1 for byte in content[first:])
    with path.open("r+b") as file:
        file.write(content)


def flip_head(path: Path) -> None:
    flip(path, 0.02)


def cut(path: Path) -> None:
    """Half of it is left."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lose(path: Path) -> None:
    path.unlink()


def swap(path: Path, other: Path) -> None:
    """Each gets the other's content, in place."""
    a, b = path.read_bytes(), other.read_bytes()
    path.write_bytes(b)
    other.write_bytes(a)


EVERY_BYTE = "a bit of every byte after its head flipped"
ALONE: dict[str, Callable[[Path], None]] = {
    "a bit of its middle flipped": flip,
    "a bit of its head flipped": flip_head,
    EVERY_BYTE: flip_all,
    "cut to half": cut,
    "emptied": empty,
    "lost": lose,
}


class Backup:
    """Files as they were, to be put back as a user would from a copy."""

    def __init__(self, keep: Path, *paths: Path) -> None:
        keep.mkdir(parents=True)
        self._pairs = [(path, keep / f"{number}") for number, path in enumerate(paths)]
        for path, copy in self._pairs:
            shutil.copyfile(path, copy)

    def restore(self) -> None:
        for path, copy in self._pairs:
            shutil.copyfile(copy, path)
