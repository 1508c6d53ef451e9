"""manifest.json: what a prepared folder holds, with the size and hash of every file in it.

    manifest.json  tokenizer.json or tokenizer.model  report.md  report.png  rejected.jsonl
    <split>/<source>/index.json  lengths.npy  shard.00000.mds.zstd ...

Each <split>/<source> is a data set of mosaicml-streaming (MDS, columns "name" and "tokens"). Written by `data_prep`,
trusted by `titans_train.data`: a file that disagrees with it is never read. Plain data; imports neither torch nor
streaming.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from data_prep.manifest_checks import problems, shown
from titans_train.untrusted import parse_json

VERSION = 2
FILE_NAME = "manifest.json"
LARGEST = 256 << 20  # bytes of it that are read: of half a million shards
SPLITS = ("train", "validation")
DEFAULT_SOURCE = "text"  # of documents that name no source
_BLOCK_BYTES = 1 << 20
_OWN_HASH = "manifest_xxh64"
_ZEROS = "0" * 16


class ManifestError(ValueError):
    """The manifest cannot be read, contradicts itself, or declares what cannot be."""


@dataclass(frozen=True)
class FileEntry:
    """One file: name inside its folder, size in bytes, xxh64 of its content (16 hex digits)."""

    name: str
    bytes: int
    xxh64: str


@dataclass(frozen=True)
class ShardEntry:
    """One MDS shard. `compressed` is what lies in the folder where it is not None, else `raw` does."""

    documents: int
    tokens: int
    raw: FileEntry
    compressed: FileEntry | None

    @property
    def stored(self) -> FileEntry:
        return self.compressed or self.raw


@dataclass(frozen=True)
class SplitEntry:
    """One source in one split.

    `tokens` counts one end-of-document token per document; `text_bytes` is UTF-8, without it.
    """

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardEntry, ...]
    index: FileEntry  # streaming's own index.json
    lengths: FileEntry  # tokens of each document, int64 .npy, in shard order


@dataclass(frozen=True)
class TokenizerEntry:
    kind: str  # "bytes", "huggingface" or "sentencepiece"
    sha256: str
    vocabulary: int  # token ids are below this
    end_of_document: int
    file: FileEntry | None  # the copied tokenizer.json or tokenizer.model; None for bytes


@dataclass(frozen=True)
class Manifest:
    version: int
    tokenizer: TokenizerEntry
    dtype: str  # "uint16" or "uint32", little-endian
    tool: str  # version of this project that wrote it
    settings: dict[str, Any]  # what preparing was asked for; the same settings are not prepared twice
    report: dict[str, Any]  # what was read, left out and why (counts), for people
    splits: dict[str, dict[str, SplitEntry]]  # split -> source, in sorted order; a source without documents is absent
    others: tuple[FileEntry, ...] = ()  # files for people beside the manifest

    def files(self) -> Iterator[tuple[str, FileEntry]]:
        """Every stored file as (path below the folder, entry), the manifest itself excepted."""
        if self.tokenizer.file is not None:
            yield self.tokenizer.file.name, self.tokenizer.file
        yield from ((file.name, file) for file in self.others)
        for split, sources in self.splits.items():
            for source, entry in sources.items():
                for file in (entry.index, entry.lengths, *(shard.stored for shard in entry.shards)):
                    yield f"{split}/{source}/{file.name}", file

    def to_text(self) -> str:
        """JSON, with the hash of itself: of the whole text with zeros in the hash's place."""
        text = json.dumps({**asdict(self), _OWN_HASH: _ZEROS}, indent=1, sort_keys=True) + "\n"
        return text.replace(_line(_ZEROS), _line(xxhash.xxh64_hexdigest(text)))

    @classmethod
    def from_text(cls, text: str, where: str) -> Manifest:
        """Raise ManifestError naming `where` when the text is not a manifest of this version, or see `problems`."""
        try:
            data = parse_json(text)
            if data["version"] != VERSION:
                found = shown(data["version"])
                raise ManifestError(
                    f"{where}: manifest version {found}, this code reads {VERSION}; prepare the data again"
                )
            _check_own_hash(text, str(data[_OWN_HASH]), where)
            manifest = cls(
                version=VERSION,
                tokenizer=TokenizerEntry(**{**data["tokenizer"], "file": _file(data["tokenizer"]["file"])}),
                dtype=data["dtype"],
                tool=data["tool"],
                settings=data["settings"],
                report=data["report"],
                splits={
                    name: {source: _split(entry) for source, entry in sorted(data["splits"][name].items())}
                    for name in SPLITS
                },
                others=tuple(FileEntry(**file) for file in data["others"]),
            )
        except ManifestError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {shown(str(error))}"
            raise ManifestError(f"{where} is not a complete manifest ({why}); prepare the data again") from error
        if (problem := next(problems(manifest), None)) is not None:
            raise ManifestError(f"{where}: {problem}; prepare the data again")
        return manifest


def _line(digest: str) -> str:
    return f'"{_OWN_HASH}": "{digest}"'


def _check_own_hash(text: str, stated: str, where: str) -> None:
    found = xxhash.xxh64_hexdigest(text.replace(_line(stated), _line(_ZEROS), 1))
    if found != stated:
        raise ManifestError(
            f"{where} is damaged or was changed: xxh64 {found}, expected {stated}; copy it again from where the data "
            "was prepared, or prepare the data again"
        )


def _file(data: dict[str, Any] | None) -> FileEntry | None:
    return FileEntry(**data) if data is not None else None


def _split(data: dict[str, Any]) -> SplitEntry:
    shards = tuple(
        ShardEntry(
            documents=shard["documents"],
            tokens=shard["tokens"],
            raw=FileEntry(**shard["raw"]),
            compressed=_file(shard["compressed"]),
        )
        for shard in data["shards"]
    )
    files = {"index": FileEntry(**data["index"]), "lengths": FileEntry(**data["lengths"])}
    return SplitEntry(**{**data, "shards": shards, **files})


def hash_stream(stream: BinaryIO) -> tuple[int, str]:
    """(bytes, xxh64 hex) of what is left in a binary stream, read block by block."""
    digest, size = xxhash.xxh64(), 0
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def describe_file(path: Path) -> FileEntry:
    """Size and hash of a file as it lies on the disk; OSError where it cannot be read."""
    with path.open("rb") as stream:
        size, digest = hash_stream(stream)
    return FileEntry(path.name, size, digest)
