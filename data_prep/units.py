"""One unit of the input to an intermediate: tokens, a table of documents, rejected records; or nothing at all.

000123.tokens     the token ids of all documents, one after the other, each with its end-of-document token
000123.documents  one row of DOCUMENT for each
000123.rejected   a JSON line for each record that is no document
000123.json       UnitRecord; written last, so the unit is done when this is there
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.durable import has_bytes, read_json, whole_file, write_json
from data_prep.errors import PrepareError
from data_prep.manifest import FileEntry, describe_file
from data_prep.pool import advance
from data_prep.readers import Document, ReadSettings, Rejected, read_unit
from data_prep.settings import Settings, is_validation, token_dtype
from data_prep.sources import Unit
from data_prep.tokenizer import Tokenizer, from_spec

BATCH_DOCUMENTS = 256
BATCH_BYTES = 1 << 20
WHOLE_FILE = 0  # in `line`: the document is a whole file

DOCUMENT = np.dtype([
    ("hash_high", "<u8"), ("hash_low", "<u8"),  # xxh3_128 of the UTF-8 text
    ("line", "<i8"),  # within the unit's part of the file, from 1; WHOLE_FILE where the file is one document
    ("tokens", "<u4"), ("text_bytes", "<u4"),
    ("file", "<u4"),  # index into the unit's files
    ("source", "<u4"),  # index into the record's sources
    ("validation", "?"),
])  # fmt: skip
Rows = NDArray[np.void]
_FILES = ("tokens", "documents", "rejected")


@dataclass
class UnitRecord:
    """A finished unit: what it covers, its files as they should be, and its sums."""

    number: int
    key: str  # Unit.key() of the unit
    settings: str  # hash of what else decides its content
    tokens: FileEntry
    documents: FileEntry
    rejected: FileEntry
    text_bytes: int = 0
    document_count: int = 0
    rejected_counts: dict[str, int] = field(default_factory=dict)  # by reason
    sources: list[str | None] = field(default_factory=list)  # as the documents name them, in order of appearance
    lines: list[int] = field(default_factory=list)  # that were read of each of the unit's files


def file_of(folder: Path, number: int, kind: str) -> Path:
    """kind: tokens, documents, rejected or json."""
    return folder / f"{number:06}.{kind}"


def find_record(folder: Path, unit: Unit, settings: str) -> UnitRecord | None:
    """The record of an earlier run, when its table and rejected records are whole; the tokens are not looked at."""
    record = _read_record(file_of(folder, unit.number, "json"))
    if record is None or (record.key, record.settings) != (unit.key(), settings):
        return None
    small = (record.documents, record.rejected)
    return record if all(_is_whole(folder / entry.name, entry) for entry in small) else None


def _read_record(path: Path) -> UnitRecord | None:
    data = read_json(path)
    if not isinstance(data, dict):
        return None
    try:
        for name in _FILES:
            data[name] = FileEntry(**data[name])
        return UnitRecord(**data)
    except (KeyError, TypeError):
        return None


def _is_whole(path: Path, entry: FileEntry) -> bool:
    return has_bytes(path, entry.bytes) and describe_file(path) == entry


def read_rows(folder: Path, record: UnitRecord) -> Rows:
    """The unit's table of documents: an array of DOCUMENT."""
    return np.fromfile(folder / record.documents.name, DOCUMENT)


def lines_before(units: Sequence[Unit], records: Sequence[UnitRecord]) -> Iterator[list[int]]:
    """For each unit: how many lines of each of its files earlier units have read."""
    path, before = "", 0  # only a file that begins a unit can have begun in an earlier one
    for unit, record in zip(units, records, strict=False):
        first = before if unit.files[0].path == path else 0
        yield [first, *([0] * (len(unit.files) - 1))]
        path, before = unit.files[-1].path, record.lines[-1] + (first if len(unit.files) == 1 else 0)


def read_rejected(folder: Path, record: UnitRecord) -> Iterator[dict[str, Any]]:
    """file (its index), line, reason, detail, excerpt, and `after`: how many documents of the unit came before."""
    with (folder / record.rejected.name).open("rb") as stream:
        for line in stream:
            yield json.loads(line)


@dataclass(frozen=True)
class UnitWriter:
    """Tokenises a unit, unless an earlier run left it whole. Goes to worker processes."""

    folder: Path
    tokenizer: Any  # Tokenizer.spec()
    tokenizer_sha256: str
    read: ReadSettings
    settings: Settings

    @functools.cached_property
    def key(self) -> str:
        """Hash of what decides a unit's content besides the unit: what only shards depend on is left out."""
        decides = [self.tokenizer_sha256, asdict(self.read), self.settings.validation_share, self.settings.seed,
                   self.settings.max_bytes, DOCUMENT.descr]  # fmt: skip
        return xxhash.xxh64(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    def __call__(self, unit: Unit) -> UnitRecord:
        record = find_record(self.folder, unit, self.key)
        if record is not None and _is_whole(self.folder / record.tokens.name, record.tokens):
            return record
        if self.tokenizer_sha256 not in _tokenizers:
            tokenizer = from_spec(self.tokenizer)
            if tokenizer.sha256 != self.tokenizer_sha256:
                raise PrepareError(f"tokenizer {tokenizer.path} has changed since the run began; run again")
            _tokenizers[self.tokenizer_sha256] = tokenizer
        return _tokenise(self, unit, _tokenizers[self.tokenizer_sha256])


_tokenizers: dict[str, Tokenizer] = {}  # loaded once in each process


def _tokenise(writer: UnitWriter, unit: Unit, tokenizer: Tokenizer) -> UnitRecord:
    folder = writer.folder
    file_of(folder, unit.number, "json").unlink(missing_ok=True)
    with ExitStack() as stack:
        streams = [
            _HashedStream(path.name, stack.enter_context(whole_file(path)))
            for path in (file_of(folder, unit.number, kind) for kind in _FILES)
        ]
        whole = [file.kind == "text" and writer.read.separator is None for file in unit.files]
        content = _Content(tokenizer, writer.settings, whole, *streams)
        reader = read_unit(unit, writer.read)
        content.add_all(iter(reader))
        reader.check()
    tokens, documents, rejected = (stream.entry() for stream in streams)
    record = UnitRecord(
        unit.number, unit.key(), writer.key, tokens, documents, rejected, content.text_bytes,
        content.documents, dict(sorted(content.rejected.items())), list(content.sources), list(reader.lines),
    )  # fmt: skip
    write_json(file_of(folder, unit.number, "json"), asdict(record))
    return record


class _HashedStream:
    def __init__(self, name: str, stream: BinaryIO) -> None:
        self.name, self._stream, self._digest, self._bytes = name, stream, xxhash.xxh64(), 0

    def write(self, data: bytes) -> None:
        self._digest.update(data)
        self._bytes += self._stream.write(data)

    def entry(self) -> FileEntry:
        return FileEntry(self.name, self._bytes, self._digest.hexdigest())


class _Content:
    """What goes into the three files, batch by batch, and the sums."""

    def __init__(
        self, tokenizer: Tokenizer, settings: Settings, whole: list[bool],
        tokens: _HashedStream, documents: _HashedStream, rejected: _HashedStream,
    ) -> None:  # fmt: skip
        self.text_bytes = self.documents = 0
        self.rejected: Counter[str] = Counter()
        self.sources: dict[str | None, int] = {}
        self._tokenizer, self._settings = tokenizer, settings
        self._whole = whole  # of each file: it is one document
        self._streams = tokens, documents, rejected
        self._dtype = token_dtype(tokenizer)
        self._end = np.array([tokenizer.end_of_document], self._dtype)

    def add_all(self, items: Iterator[Document | Rejected]) -> None:
        """All items, or up to the first document that passes --max-bytes by itself."""
        limit = self._settings.max_bytes
        batch: list[tuple[Document, bytes]] = []
        size = 0
        for item in items:
            if isinstance(item, Rejected):
                self._reject(item, self.documents + len(batch))
                continue
            text = item.text.encode("utf-8")
            batch.append((item, text))
            size += len(text)
            full = limit is not None and self.text_bytes + size > limit
            if full or size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
                self._add(batch)
                batch, size = [], 0
            if full:
                return
        if batch:
            self._add(batch)

    def _add(self, batch: list[tuple[Document, bytes]]) -> None:
        rows = np.zeros(len(batch), DOCUMENT)
        encoded = self._tokenizer.encode([document.text for document, _ in batch])
        pieces = []
        for row, (document, text), ids in zip(rows, batch, encoded, strict=True):
            digest = xxhash.xxh3_128_intdigest(text)
            pieces += [ids.astype(self._dtype), self._end]
            row["hash_high"], row["hash_low"] = digest >> 64, digest & (2**64 - 1)
            row["line"] = WHOLE_FILE if self._whole[document.file] else document.line
            row["tokens"], row["text_bytes"] = len(ids) + 1, len(text)
            row["file"] = document.file
            row["source"] = self.sources.setdefault(document.source or None, len(self.sources))
            row["validation"] = is_validation(text, self._settings.validation_share, self._settings.seed)
        self._streams[0].write(np.concatenate(pieces).tobytes())
        self._streams[1].write(rows.tobytes())
        added = int(rows["text_bytes"].sum())
        self.text_bytes += added
        self.documents += len(batch)
        advance(added, int(rows["tokens"].sum()))

    def _reject(self, item: Rejected, after: int) -> None:
        self.rejected[item.reason] += 1
        line = WHOLE_FILE if self._whole[item.file] else item.line
        record = {"file": item.file, "line": line, "reason": item.reason, "detail": item.detail,
                  "excerpt": item.excerpt, "after": after}  # fmt: skip
        self._streams[2].write(json.dumps(record).encode("utf-8") + b"\n")
