"""A file that grows by whole records, on a disk that may be full for a while: that does not end a run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

KEPT = 10_000  # records that wait in memory for room on the disk


class Appended:
    """`write` never fails: what the disk does not take is kept, the oldest lost beyond KEPT, and written later.

    The file ends with a whole record whenever a call has returned. say: is told once when writing fails and once when
    it works again. Each write opens the file anew: some file systems say only at the closing that they are full.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        self.path, self._say = path, say
        self._waiting: deque[bytes] = deque(maxlen=KEPT)
        self._lost = 0
        self._fails = False
        self._whole: int | None = None  # bytes before the half record that a failed write may have left

    def write(self, record: bytes) -> None:
        self._lost += len(self._waiting) == KEPT
        self._waiting.append(record)
        self._flush()

    def close(self) -> None:
        self._flush()
        if self._waiting:
            self._say(f"{self.path} could not be written: its last {len(self._waiting) + self._lost} records are lost")

    def _flush(self) -> None:
        if not self._waiting:
            return
        try:
            self._append(b"".join(self._waiting))
        except OSError as error:
            if not self._fails:
                self._say(
                    f"{self.path} cannot be written ({error.strerror or error}); training goes on, and what belongs "
                    "there is kept in memory until it can be"
                )
            self._fails = True
            return
        self._waiting.clear()
        if self._fails:
            lost = f"the oldest {self._lost} records that waited are lost" if self._lost else "nothing of it is lost"
            self._say(f"{self.path} can be written again; {lost}")
        self._fails, self._lost = False, 0

    def _append(self, content: bytes) -> None:
        """All of it, or nothing and an OSError."""
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if self._whole is not None and self._whole < size:
                file.truncate(self._whole)
            self._whole = size if self._whole is None else min(size, self._whole)
            left = memoryview(content)
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                with suppress(OSError):  # then the next call does
                    file.truncate(self._whole)
                raise
        self._whole = None
