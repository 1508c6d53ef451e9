"""A stream of bytes cut at a separator, in bounded memory: lines, or the documents of a text file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

READ_BYTES = 1 << 20
HEAD_BYTES = 1024  # kept of a piece that is too long


class Piece(NamedTuple):
    begin: int  # offset of its first byte in the file
    data: bytes | bytearray  # without the separator; of a piece that is too long only the first HEAD_BYTES
    too_long: bool
    last: bool  # the file ends here: no separator follows


def pieces(
    read: Callable[[int], bytes],
    separator: bytes,
    limit: int,
    position: int = 0,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[Piece]:
    """The pieces whose first byte has an offset in [begin, end); None: to the end of the stream.

    `read` gives the next bytes of the stream, up to a number, none at its end; its first byte has the offset
    `position`, which is `start_of(begin, separator)`. A piece begins at 0 and where a separator ends, wherever a
    separator is found, in another one too; so the pieces of neighbouring ranges are together those of the file.
    Pieces of more than `limit` bytes are not held. A file does not end with an empty piece.
    """
    buffer = bytearray()  # the bytes from `position` on
    start = search = 0  # indices in the buffer: of this piece, and from where to look for its end
    head: tuple[int, bytes] | None = None  # of a piece found too long before its end: its offset, its first bytes
    while True:
        if head is None and end is not None and position + start >= end:
            return
        found = buffer.find(separator, search)
        if found < 0:
            search = max(search, len(buffer) - len(separator) + 1)
            if head is None and len(buffer) - start > limit + len(separator):
                head = position + start, bytes(buffer[start : start + HEAD_BYTES])
            if head is not None:
                start = max(start, search)
            done = min(start, search)
            del buffer[:done]
            position, start, search = position + done, start - done, search - done
            block = read(READ_BYTES)
            if block:
                buffer += block
                continue
        stop = len(buffer) if found < 0 else max(found, start)
        offset = position + start if head is None else head[0]
        if offset >= begin and (found >= 0 or head is not None or stop > start):
            too_long = head is not None or stop - start > limit
            data = head[1] if head is not None else buffer[start : min(stop, start + HEAD_BYTES) if too_long else stop]
            yield Piece(offset, data, too_long, found < 0)
        if found < 0:
            return
        start, search, head = found + len(separator), found + 1, None


def start_of(begin: int, separator: bytes) -> int:
    """Where to start reading for the pieces that begin at `begin` or later."""
    return max(0, begin - len(separator))
