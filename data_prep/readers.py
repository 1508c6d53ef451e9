"""The documents of a unit, in order, and the records that are none, in memory that does not grow with the files.

Bad content is a `Rejected`; a storage that does not answer, or a file that has changed since it was found, ends the
reading with a PrepareError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from data_prep.addresses import is_remote
from data_prep.errors import InputChangedError
from data_prep.pieces import READ_BYTES, Piece, pieces, start_of
from data_prep.records import (
    REASONS,
    TOO_LONG,
    UNREADABLE_FILE,
    Document,
    ReadSettings,
    Refusal,
    Rejected,
    check_source,
    check_text,
    decode,
    excerpt,
    parse_line,
    too_long,
)
from data_prep.sources import SourceFile, Unit
from data_prep.storage import FileState, StorageError, StorageFile, decompress, open_input, printable
from data_prep.table import rows

__all__ = ["REASONS", "Document", "ReadSettings", "Rejected", "UnitReader", "read_unit"]

_BOM = b"\xef\xbb\xbf"
_ESCAPE_BYTES = 6  # of JSON for each byte of a text, at most: \\u0001
_FIELDS_BYTES = 1 << 20  # of a line besides its longest possible text


class UnitReader(Iterator["Document | Rejected"]):
    """An iterator over a unit's records.

    At its end `lines` holds how many lines, rows or documents each of the unit's files has in it. Blank lines of JSON
    Lines are counted and otherwise passed over. PrepareError where a file is not as it was when it was found.
    """

    def __init__(self, unit: Unit, settings: ReadSettings) -> None:
        self.lines = [0] * len(unit.files)
        self._unit, self._settings = unit, settings
        self._open: tuple[SourceFile, StorageFile] | None = None
        self._records = self._read_all()

    def __next__(self) -> Document | Rejected:
        return next(self._records)

    def _read_all(self) -> Iterator[Document | Rejected]:
        for index, file in enumerate(self._unit.files):
            with open_input(file.path) as opened:
                _check_unchanged(file, opened.state)
                self._open = file, opened
                yield from self._records_of(index, file, opened)
                self.check()
                self._open = None

    def check(self) -> None:
        """PrepareError where the file that is being read has changed; for a reader that leaves off before the end."""
        if self._open is not None:
            file, opened = self._open
            now = opened.state_now()
            _check_unchanged(file, now)
            if now != opened.state:
                raise _changed(file, "is another one now than when its reading began")

    def _records_of(self, index: int, file: SourceFile, opened: StorageFile) -> Iterator[Document | Rejected]:
        if file.kind == "parquet":
            yield from self._rows(index, file, opened)
        elif file.is_one_document(self._settings.separator):
            self.lines[index] = 1
            yield _whole(index, file, opened, self._settings)
        else:
            yield from self._pieces(index, file, opened)

    def _range(self, file: SourceFile) -> tuple[int, int]:
        return (self._unit.begin, self._unit.end) if len(self._unit.files) == 1 else (0, file.bytes)

    def _rows(self, index: int, file: SourceFile, opened: StorageFile) -> Iterator[Document | Rejected]:
        for number, (text, source) in rows(opened, *self._range(file), self._settings):
            self.lines[index] = number
            try:
                if isinstance(text, Refusal):
                    raise text
                document = Document(number, index, check_text(text, self._settings), check_source(source))
            except Refusal as refusal:
                yield _rejected(number, index, refusal, text)
            else:
                yield document

    def _pieces(self, index: int, file: SourceFile, opened: StorageFile) -> Iterator[Document | Rejected]:
        """The lines of JSON Lines, or the documents between separators."""
        lines = file.kind == "lines"
        separator = b"\n" if lines else str(self._settings.separator).encode("utf-8")
        limit = self._settings.max_document_bytes
        if lines:
            limit = limit * _ESCAPE_BYTES + _FIELDS_BYTES
        begin, end = self._range(file)
        position = start_of(begin, separator)
        opened.seek(position)
        stream = decompress(opened, file.compression)
        found = pieces(stream.read, separator, limit, position, begin, None if file.compression else end)
        number = 0
        try:
            for number, piece in enumerate(found, start=1):
                self.lines[index] = number
                blank = not piece.data or piece.data.isspace()
                if not (blank and (lines or (piece.last and piece.begin > 0))):
                    yield _parse(number, index, piece, lines, limit, self._settings)
        except StorageError:
            raise
        except OSError as error:
            yield Rejected(number + 1, index, UNREADABLE_FILE, f"damaged from here on: {error}", "")


def read_unit(unit: Unit, settings: ReadSettings | None = None) -> UnitReader:
    """The documents of a unit and what was rejected, in order.

    PrepareError: a file has changed since it was found. StorageError: a file cannot be opened or read.
    """
    return UnitReader(unit, settings or ReadSettings())


def _check_unchanged(file: SourceFile, now: FileState) -> None:
    """Against what it was when it was found; S3 then tells parts of seconds, and later none."""
    if now.bytes != file.bytes:
        raise _changed(file, f"has {now.bytes:,} bytes now, it had {file.bytes:,} when it was found")
    second = 10**9 if is_remote(file.path) else 1
    if file.mtime_ns and now.mtime_ns and now.mtime_ns // second != file.mtime_ns // second:
        raise _changed(file, "was written to after it was found")


def _changed(file: SourceFile, how: str) -> InputChangedError:
    return InputChangedError(
        f"{printable(file.path)} {how}; let nothing write it, and start again with --restart when it is at rest"
    )


def _parse(
    number: int, index: int, piece: Piece, is_line: bool, limit: int, settings: ReadSettings
) -> Document | Rejected:
    data = piece.data.removeprefix(_BOM) if piece.begin == 0 else piece.data
    try:
        if piece.too_long:
            what = f"a line of more than {limit:,} bytes" if is_line else f"more than {limit:,} bytes"
            allowed = f"; at most {settings.max_document_bytes:,} of text are allowed (--max-document-size)"
            raise Refusal(TOO_LONG, what + allowed)
        text, source = parse_line(data, settings) if is_line else (check_text(decode(data), settings), None)
        return Document(number, index, text, source)
    except Refusal as refusal:
        return _rejected(number, index, refusal, data)


def _whole(index: int, file: SourceFile, opened: StorageFile, settings: ReadSettings) -> Document | Rejected:
    """A file that is one document."""
    limit = settings.max_document_bytes + len(_BOM)
    data = b""
    try:
        if file.compression is None and file.bytes > limit:
            raise too_long(file.bytes, settings)
        data = _read_up_to(decompress(opened, file.compression), limit + 1)
        if len(data) > limit:
            raise Refusal(
                TOO_LONG, f"more than the {settings.max_document_bytes:,} bytes that are allowed (--max-document-size)"
            )
        return Document(1, index, check_text(data.removeprefix(_BOM), settings), None)
    except Refusal as refusal:
        return _rejected(1, index, refusal, data)
    except StorageError:
        raise
    except OSError as error:
        return Rejected(1, index, UNREADABLE_FILE, f"damaged: {error}", "")


def _read_up_to(stream: IO[bytes], size: int) -> bytes:
    blocks = []
    while size > 0 and (block := stream.read(min(size, READ_BYTES))):
        blocks.append(block)
        size -= len(block)
    return b"".join(blocks)


def _rejected(line: int, index: int, refusal: Refusal, content: Any) -> Rejected:
    return Rejected(line, index, refusal.reason, refusal.detail, excerpt(content))
