"""Read pieces of documents from one raw MDS file of mosaicml-streaming, with columns name: str and tokens: bytes.

uint32 samples | uint32 offsets [samples + 1] | JSON of the columns | samples
a sample: uint32 bytes of the name | uint32 bytes of the tokens | name | tokens          (all little-endian)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.unsignedinteger[Any]]
_HEADER = 8
_SMALL_BYTES = 4096  # a sample, on average: reading whole files is then faster than reading each header
_WINDOW_BYTES = 1 << 20


class MdsFile:
    """One open file. Never mapped: a file that was cut is an error, not a signal. Closed with its last reference."""

    def __init__(self, path: Path, documents: int) -> None:
        """OSError: cannot be read. ValueError: the table of offsets is not that of `documents` samples."""
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.path = path
        info = os.fstat(self.descriptor)
        self._state = _state(info)
        if 4 * (documents + 2) > info.st_size:  # before memory is set aside for the table
            raise ValueError(f"expected {documents} documents, {info.st_size} bytes have no table of so many")
        table = np.frombuffer(self._read(0, 4 * (documents + 2)), "<u4")
        self._offsets = table[1:].copy()
        self.ends = self._offsets[1:].data  # of each document, in bytes; fast to index
        if int(table[0]) != documents or not check_offsets(table[1:], info.st_size):
            raise ValueError(f"expected {documents} documents, its table says {table[0]}, or its offsets are wrong")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def unchanged(self) -> bool:
        """Whether nobody has written to the file since it was opened."""
        now = _state(os.fstat(self.descriptor))
        return now == self._state or (now[3] == 0 and now[:3] == self._state[:3])

    def is_at(self, path: Path) -> bool:
        """Whether this is the file that `path` names now, unchanged. OSError: there is none."""
        return _state(path.stat()) == self._state

    def removed(self) -> bool:
        """Whether the file has no name any more, so that its bytes are free when it is closed."""
        return os.fstat(self.descriptor).st_nlink == 0

    def lengths(self, itemsize: int) -> NDArray[np.int64]:
        """Tokens of each document, of `itemsize` bytes each, from all headers.

        ValueError: a header contradicts the table.
        """
        begins, ends = self._offsets[:-1].astype(np.int64), self._offsets[1:].astype(np.int64)
        names, tokens = self._headers(begins)
        if (wrong := np.flatnonzero(begins + _HEADER + names + tokens != ends)).size:
            self._sizes(int(wrong[0]))
        return tokens // itemsize

    def _headers(self, begins: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(bytes of the name, bytes of the tokens) of each sample. Small samples are read together."""
        count, end, first = len(begins), int(self._offsets[-1]), 0
        if end >= count * _SMALL_BYTES:
            headers = np.frombuffer(b"".join(self._read(begin, _HEADER) for begin in begins.tolist()), np.uint8)
        else:
            headers = np.empty(_HEADER * count, np.uint8)
        while first < count and end < count * _SMALL_BYTES:
            begin = int(begins[first])
            data = np.frombuffer(self._read(begin, min(_WINDOW_BYTES, end - begin)), np.uint8)
            last = int(begins.searchsorted(begin + len(data) - _HEADER, side="right"))
            found = data[(begins[first:last] - begin)[:, None] + np.arange(_HEADER)]
            headers[_HEADER * first : _HEADER * last] = found.reshape(-1)
            first = last
        names, tokens = headers.view("<u4").reshape(count, 2).astype(np.int64).T
        return names, tokens

    def name(self, index: int) -> str:
        """The name a document was prepared under."""
        begin, size, _ = self._sizes(index)
        return self._read(begin + _HEADER, size).decode("utf-8")

    def read_into(self, index: int, before_end: int, buffer: memoryview) -> None:
        """Bytes of document `index` from `before_end` before its end on, as many as the buffer has.

        ValueError: it has fewer. Its header is not read: the table says where it ends.
        """
        begin, end = int(self._offsets[index]), self.ends[index]
        if before_end > end - begin - _HEADER:
            raise ValueError(f"it has {end - begin - _HEADER} bytes, {before_end} of tokens expected")
        if os.preadv(self.descriptor, (buffer,), end - before_end) != len(buffer):  # cut, or interrupted
            buffer[:] = self._read(end - before_end, len(buffer))

    def _sizes(self, index: int) -> tuple[int, int, int]:
        """(offset of the sample, bytes of the name, bytes of the tokens)."""
        begin, end = int(self._offsets[index]), int(self._offsets[index + 1])
        header = self._read(begin, _HEADER)
        name, tokens = int.from_bytes(header[:4], "little"), int.from_bytes(header[4:], "little")
        if begin + _HEADER + name + tokens != end:
            raise ValueError(f"document {index} says {name} + {tokens} bytes, the table {end - begin - _HEADER} in all")
        return begin, name, tokens

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"it ends at byte {offset + len(data)}, expected {offset + size} or more")
            data += more
        return data


def _state(info: os.stat_result) -> tuple[int, int, int, int]:
    """Changes when a file is written to, even where its modification time is put back; not when it is removed."""
    return info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns if info.st_nlink else 0


def check_offsets(offsets: NDArray[np.uint32], size: int) -> bool:
    """Whether a table of offsets leads through a file of `size` bytes in order, to its end."""
    if len(offsets) == 0 or int(offsets[-1]) != size or int(offsets[0]) < 4 * (len(offsets) + 1):
        return False
    return bool((np.diff(offsets.astype(np.int64)) >= _HEADER).all())
