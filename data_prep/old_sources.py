"""Where documents come from: folders and files of text, JSON Lines and Parquet, or the default corpus.

Everything is in sorted order, so the same input always gives the same shards. What a user names and cannot be
read ends the preparing; nothing is dropped silently except what a folder holds besides text, which is counted.
"""

from __future__ import annotations

import importlib
import json
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from data_prep.errors import PrepareError

TEXT_SUFFIXES = (".md", ".py", ".txt")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
DEFAULT_SUFFIXES = (".py", ".txt")
DEFAULT_SKIPPED_FOLDERS = ("__pycache__", "dist-packages", "site-packages")
_PARQUET_BATCH_ROWS = 256


@dataclass(frozen=True)
class Document:
    name: str  # path inside the input, with :line or :row where one file holds many
    text: str


@dataclass(frozen=True)
class SourceFile:
    path: Path
    name: str  # path relative to the input it was found under, with that input's own name in front
    bytes: int


@dataclass
class Corpus:
    """The files to read, in order, and what was left out on the way (counts by reason)."""

    files: list[SourceFile]
    fingerprint: str  # changes when the set of files, a size or a time of change does
    text_field: str
    skip_undecodable: bool  # default corpus only: the standard library carries test data in other encodings
    max_bytes: int | None = None  # of text; reading stops before the document that would pass it
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes of text to expect: exact for text, an upper limit otherwise."""
        total = sum(_expanded_bytes(file) for file in self.files)
        return total if self.max_bytes is None else min(total, self.max_bytes)

    def documents(self) -> Iterator[Document]:
        """Non-empty documents, in order. PrepareError names the file (and line) that cannot be read."""
        used = 0
        for file in self.files:
            for document in self._read(file):
                if not document.text:
                    self.skip("empty document")
                    continue
                used += len(document.text.encode("utf-8"))
                if self.max_bytes is not None and used > self.max_bytes:
                    self.skip("the rest, beyond --max-bytes")
                    return
                yield document

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def _read(self, file: SourceFile) -> Iterator[Document]:
        try:
            if file.path.suffix == ".jsonl":
                yield from _read_jsonl(file, self.text_field)
            elif file.path.suffix == ".parquet":
                yield from _read_parquet(file, self.text_field)
            else:
                yield Document(file.name, _decode(file.path.read_bytes(), str(file.path)))
        except NotUtf8Error:
            if not self.skip_undecodable:
                raise
            self.skip("not UTF-8")
        except OSError as error:
            raise PrepareError(
                f"cannot read {file.path}: {error.strerror or error}; give read permission or leave it out of --input"
            ) from error


class NotUtf8Error(PrepareError):
    """A text is not UTF-8."""


def find_files(inputs: Sequence[str], text_field: str) -> Corpus:
    """The corpus of the paths a user named: files as they are, folders with all that is below them."""
    files: dict[Path, SourceFile] = {}
    corpus = Corpus([], "", text_field, skip_undecodable=False)
    for text in inputs:
        root = Path(text).expanduser()
        if not root.exists():
            raise PrepareError(f"--input {text}: no such file or folder; check the spelling")
        if root.is_file() and root.suffix not in SUFFIXES:
            raise PrepareError(f"--input {text}: unknown kind of file; known: {' '.join(SUFFIXES)}")
        for path in [root] if root.is_file() else sorted(_walk(root)):
            if path.suffix not in SUFFIXES:
                corpus.skip("unknown kind of file")
                continue
            name = (Path(root.resolve().name) / path.relative_to(root)).as_posix()
            # The same file may be named twice (a folder and a file in it); it counts once.
            files.setdefault(path.resolve(), SourceFile(path, name, path.stat().st_size))
    corpus.files = sorted(files.values(), key=lambda file: (file.name, str(file.path)))
    if not corpus.files:
        raise PrepareError(f"no {' '.join(SUFFIXES)} file in {' '.join(inputs)}; name a folder that holds text")
    state = [[file.name, file.bytes, file.path.stat().st_mtime_ns] for file in corpus.files]
    corpus.fingerprint = xxhash.xxh64(json.dumps(state).encode()).hexdigest()
    return corpus


def default_corpus(max_bytes: int | None) -> Corpus:
    """Source and text files of the running Python's standard library: real, everywhere, nothing downloaded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in sorted(_walk(root, DEFAULT_SKIPPED_FOLDERS)) if path.suffix in DEFAULT_SUFFIXES]
    files = [SourceFile(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in found]
    # Without times of change: the standard library of one Python version is the same wherever it was unpacked.
    state = [platform.python_version(), *([file.name, file.bytes] for file in files)]
    fingerprint = xxhash.xxh64(json.dumps(state).encode()).hexdigest()
    return Corpus(files, fingerprint, "text", skip_undecodable=True, max_bytes=max_bytes)


def _walk(folder: Path, skipped: Sequence[str] = ()) -> Iterator[Path]:
    """Regular files below `folder`, without hidden files and folders; links to folders are not followed."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise PrepareError(f"cannot list {folder}: {error.strerror}; give read permission") from error
    for path in entries:
        if path.name.startswith(".") or path.name in skipped:
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, skipped)
        elif path.is_file():
            yield path


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUtf8Error(
            f"{where} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it (iconv -f OLD -t UTF-8) or leave it out of --input"
        ) from error


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file.path}:{number}"
            try:
                record = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise PrepareError(f"{where} is not JSON ({error.msg}); mend or remove the line") from error
            if not isinstance(record, dict):
                raise PrepareError(f"{where} holds a {type(record).__name__}, expected an object; mend the line")
            yield Document(f"{file.name}:{number}", _text_of(record, text_field, where))


def _text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    text = record.get(text_field)
    if not isinstance(text, str):
        has = f"is a {type(text).__name__}" if text_field in record else f"is missing; fields: {sorted(record)}"
        raise PrepareError(f"{where}: field {text_field!r} {has}; name the field that holds text with --text-field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotUtf8Error(f"{where}: field {text_field!r} holds half a surrogate pair; mend the line") from error
    return text


def _parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PrepareError("reading .parquet needs pyarrow: pip install pyarrow") from error


def _open_parquet(path: Path) -> Any:
    try:
        return _parquet().ParquetFile(path)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise PrepareError(f"{path} is not a Parquet file ({error}); replace it or leave it out of --input") from error


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    table = _open_parquet(file.path)
    names = table.schema_arrow.names
    if text_field not in names:
        raise PrepareError(f"{file.path}: no column {text_field!r}; columns: {sorted(names)}; use --text-field")
    batches = table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_field])
    row = 0
    while True:
        try:
            batch = next(batches, None)
        except ValueError as error:
            raise PrepareError(f"{file.path} is damaged after row {row} ({error}); replace it") from error
        if batch is None:
            return
        for value in batch.column(0).to_pylist():
            yield Document(f"{file.name}:{row}", _text_of({text_field: value}, text_field, f"{file.path}, row {row}"))
            row += 1


def _expanded_bytes(file: SourceFile) -> int:
    if file.path.suffix != ".parquet":
        return file.bytes
    metadata = _open_parquet(file.path).metadata
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
