"""A stream of bytes, unpacked, and cut at a separator, in bounded memory: lines, or the documents of a text file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

import zstandard

READ_BYTES = 1 << 20
HEAD_BYTES = 1024  # kept of a piece that is too long
_PACKED_BYTES = 16 << 10  # of gzip at once: what is done again, byte by byte, where it is damaged
_ZSTD_WINDOW = 1 << 27  # --long=27
_ZSTD_FRAME, _ZSTD_SKIPPED = 0xFD2FB528, 0x184D2A50


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


class DamagedFile(OSError):
    """A compressed file that does not go on as its format says."""


class Unpacked(io.RawIOBase):
    """The content of a compressed stream: all that comes before its damage, then a DamagedFile."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, all that is left for -1; b"" at the end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(READ_BYTES), b""))
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return b""
            self._rest = block
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def gunzip(packed: IO[bytes]) -> Iterator[bytes]:
    """The blocks of a gzip file of any number of members, with or without zeros behind them."""
    member, between = zlib.decompressobj(31), False
    data = packed.read(_PACKED_BYTES)
    while data:
        yield from _inflated(member, data)
        between, data = member.eof, member.unused_data.lstrip(b"\0")
        if between:
            member = zlib.decompressobj(31)
        while not data and (block := packed.read(_PACKED_BYTES)):
            data = block.lstrip(b"\0") if between else block
    if not between:
        raise DamagedFile("the file ends in the middle")


def _inflated(member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """What one piece of a member unpacks to, up to the very byte that is damaged."""
    while data:
        before = member.copy()
        try:
            block = member.decompress(data, READ_BYTES)
        except zlib.error:
            yield from _up_to_damage(before, data)
            raise AssertionError("a fault that went away") from None
        if block:
            yield block
        data = member.unconsumed_tail


def _up_to_damage(member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    for place in range(len(data)):
        try:
            block = member.decompress(data[place : place + 1])
        except zlib.error as error:
            raise DamagedFile(f"gzip: {str(error).rpartition(': ')[2]}") from error
        if block:
            yield block


def unzstd(packed: IO[bytes]) -> Iterator[bytes]:
    """The blocks of a zstd file of any number of frames: each is given to the library by itself, so none is lost."""
    start = packed.read(4) or _whole(b"", packed, 4)
    while start:
        magic = int.from_bytes(_whole(start, packed, 4), "little")
        if magic & ~0xF == _ZSTD_SKIPPED:
            left = int.from_bytes(_whole(b"", packed, 4), "little")
            while left:
                left -= len(_whole(b"", packed, min(left, READ_BYTES)))
        elif magic == _ZSTD_FRAME:
            yield from _frame(start, packed)
        else:
            raise DamagedFile("no zstd frame begins here")
        start = packed.read(4)


def _frame(start: bytes, packed: IO[bytes]) -> Iterator[bytes]:
    flags = _whole(b"", packed, 1)[0]
    single, size, dictionary = flags >> 5 & 1, flags >> 6, flags & 3
    rest = (1 - single) + (0, 1, 2, 4)[dictionary] + ((single, 2, 4, 8)[size])
    frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    try:
        frame.decompress(start + bytes([flags]) + _whole(b"", packed, rest))
        last = False
        while not last:
            head = _whole(b"", packed, 3)
            bits = int.from_bytes(head, "little")
            last, kind, length = bool(bits & 1), bits >> 1 & 3, bits >> 3
            if block := frame.decompress(head + _whole(b"", packed, 1 if kind == 1 else length)):
                yield block
        if flags & 4:
            frame.decompress(_whole(b"", packed, 4))  # the checksum
    except zstandard.ZstdError as error:
        raise DamagedFile(str(error)) from error
    if not frame.eof:
        raise DamagedFile("a zstd frame does not end where it should")


def _whole(begin: bytes, packed: IO[bytes], size: int) -> bytes:
    """`size` bytes, of which the first may have been read."""
    data = begin + packed.read(size - len(begin)) if size > len(begin) else begin
    if len(data) < size:
        raise DamagedFile("the file ends in the middle")
    return data
