"""Documents to a prepared folder: split, tokenise, write MDS shards, describe them in the manifest.

All is written into a folder beside the output and renamed when complete, so a prepared folder is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from filelock import FileLock, Timeout

from data_prep.errors import PrepareError
from data_prep.manifest import (
    DEFAULT_SOURCE,
    FILE_NAME,
    SPLITS,
    VERSION,
    FileEntry,
    Manifest,
    ManifestError,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    describe_file,
)
from data_prep.sources import Corpus, Document
from data_prep.tokenizer import TOKENIZER_FILE, Tokenizer
from titans_train import __version__

COMPRESSION = {"zstd": "zstd:7", "none": None}
LENGTHS_FILE = "lengths.npy"
INDEX_FILE = "index.json"
_BATCH_DOCUMENTS = 64
_SPARE_BYTES = 16 << 20  # kept free on the disk besides what the shards need
_ZSTD_SHARE = 0.6  # compressed bytes / token bytes, from above: measured 0.15 to 0.45 on text and code


@dataclass(frozen=True)
class Settings:
    """What decides the content of a prepared folder, besides the corpus and the tokenizer."""

    validation_share: float = 0.05
    seed: int = 0  # of the split by document hash
    shard_size: int = 16 << 20  # bytes of a decompressed shard, at most (a longer document gets its own)
    compression: str = "zstd"

    def check(self) -> None:
        """Raise PrepareError naming the value that cannot be."""
        if not 0 < self.validation_share < 1:
            raise PrepareError(f"--validation-share {self.validation_share}: must be above 0 and below 1, as 0.05")
        if not 0 <= self.seed < 2**63:
            raise PrepareError(f"--seed {self.seed}: must be from 0 to 2**63 - 1")
        if not 4096 <= self.shard_size < 2**31:
            raise PrepareError(f"--shard-size {self.shard_size}: must be from 4096 to 2**31 - 1 bytes")
        if self.compression not in COMPRESSION:
            raise PrepareError(f"--compression {self.compression}: must be one of {' '.join(COMPRESSION)}")


def prepare(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, output: Path, say: Callable[[str], None] = print
) -> Manifest:
    """Write `output` or, where it already holds exactly this, leave it. Return its manifest.

    PrepareError: another content lies there, another process prepares it, the corpus or the disk does not allow it.
    """
    settings.check()
    output = output.expanduser().absolute()
    wanted = _settings_record(corpus, tokenizer, settings)
    if (existing := _existing(output, wanted)) is not None:
        say(f"already prepared: {output}")
        return existing
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(output.parent, estimate_bytes(corpus.bytes, tokenizer, settings.compression))
        lock = FileLock(output.parent / f".{output.name}.lock", timeout=0)
        with lock:
            if (existing := _existing(output, wanted)) is not None:  # finished by another process meanwhile
                return existing
            manifest = _write_folder(corpus, tokenizer, settings, wanted, output)
            Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout as error:
        raise PrepareError(f"another process is preparing {output}; wait for it or name another --output") from error
    except OSError as error:
        raise PrepareError(
            f"writing {output} failed: {error.strerror or error}; nothing was kept. Free space or give write "
            "permission, or name an --output on another disk"
        ) from error
    return manifest


def estimate_bytes(text_bytes: int, tokenizer: Tokenizer, compression: str) -> int:
    """Bytes the output needs, from above: at most one token per byte of text."""
    token_bytes = text_bytes * _dtype(tokenizer).itemsize
    return int(token_bytes * (_ZSTD_SHARE if COMPRESSION[compression] else 1.05))


def check_free_space(folder: Path, needed: int) -> None:
    """Raise PrepareError when the disk of `folder` has less than `needed` bytes (and some spare) free."""
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise PrepareError(
            f"the disk of {folder} has {free / 1e6:,.0f} MB free, preparing may need "
            f"{(needed + _SPARE_BYTES) / 1e6:,.0f} MB; free space or name an --output on another disk"
        )


def split_of(text: str, share: float, seed: int) -> str:
    """The split of a document, from its text alone: other documents do not move it, equal ones stay together."""
    return "validation" if xxhash.xxh64_intdigest(text.encode("utf-8"), seed=seed) < share * 2.0**64 else "train"


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocabulary <= 1 << 16 else "<u4")


def _settings_record(corpus: Corpus, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    read = {"input": corpus.fingerprint, "text_field": corpus.text_field, "max_bytes": corpus.max_bytes}
    return {**asdict(settings), **read, "tokenizer": tokenizer.sha256}


def _existing(output: Path, wanted: dict[str, Any]) -> Manifest | None:
    """The manifest of a folder that holds exactly what is wanted; None where nothing lies; else PrepareError."""
    if not output.exists():
        return None
    remedy = "name another --output, or remove the folder if it is no longer needed"
    if not output.is_dir():
        raise PrepareError(f"{output} exists and is not a folder; {remedy}")
    if not any(output.iterdir()):
        return None
    path = output / FILE_NAME
    if not path.is_file():
        raise PrepareError(f"{output} exists and holds something else (no {FILE_NAME}); {remedy}")
    try:
        manifest = Manifest.from_text(path.read_text("utf-8"), str(path))
    except ManifestError as error:
        raise PrepareError(f"{error}; {remedy}") from error
    differing = [
        f"{key} {manifest.settings.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted(wanted.keys() | manifest.settings.keys())
        if manifest.settings.get(key) != wanted.get(key)
    ]
    if differing:
        raise PrepareError(f"{output} was prepared with other settings ({'; '.join(differing)}); {remedy}")
    for name, entry in manifest.files():
        found = (output / name).stat().st_size if (output / name).is_file() else None
        if found != entry.bytes:
            state = "is missing" if found is None else f"has {found} bytes, expected {entry.bytes}"
            raise PrepareError(f"{output / name} {state}; remove the folder and prepare it again")
    return manifest


def _write_folder(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, wanted: dict[str, Any], output: Path
) -> Manifest:
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run: the lock says nobody is writing it
    try:
        partial.mkdir()
        splits = _write_splits(corpus, tokenizer, settings, partial)
        file = _copy_tokenizer(tokenizer, partial)
        entry = TokenizerEntry(tokenizer.kind, tokenizer.sha256, tokenizer.vocabulary, tokenizer.end_of_document, file)
        report = {"left_out": dict(corpus.skipped)}
        manifest = Manifest(VERSION, entry, _dtype(tokenizer).name, __version__, wanted, report, splits)
        (partial / FILE_NAME).write_text(manifest.to_text(), "utf-8")
        _flush_to_disk(partial)
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_splits(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, folder: Path
) -> dict[str, dict[str, SplitEntry]]:
    writers = {split: _SplitWriter(folder / split / DEFAULT_SOURCE, tokenizer, settings) for split in SPLITS}
    try:
        for batch in _batches(corpus.documents()):
            for document, tokens in zip(batch, tokenizer.encode([item.text for item in batch]), strict=True):
                split = split_of(document.text, settings.validation_share, settings.seed)
                writers[split].add(document, tokens)
        counts = {split: len(writer.lengths) for split, writer in writers.items()}
        _check_counts(corpus, counts, settings)
        return {split: {DEFAULT_SOURCE: writer.finish()} for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.close()


def _check_counts(corpus: Corpus, counts: dict[str, int], settings: Settings) -> None:
    total = sum(counts.values())
    if total == 0:
        raise PrepareError(f"the corpus is empty: {len(corpus.files)} files, no text in them; name others with --input")
    if min(counts.values()) == 0:
        empty = min(counts, key=lambda split: counts[split])
        raise PrepareError(
            f"too few documents for the split: of {total} documents {counts['train']} fell to train and "
            f"{counts['validation']} to validation at --validation-share {settings.validation_share}, so {empty} would "
            "be empty; give more documents, another share or another --seed"
        )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> FileEntry | None:
    if tokenizer.path is None:
        return None
    shutil.copyfile(tokenizer.path, folder / TOKENIZER_FILE)
    return describe_file(folder / TOKENIZER_FILE)


def _flush_to_disk(folder: Path) -> None:
    """After a power cut the rename may have survived the content; so the content goes first."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class _SplitWriter:
    """One split's shards, through streaming's MDSWriter."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: Settings) -> None:
        from titans_train.data.shim import import_streaming

        self.lengths: list[int] = []
        self.text_bytes = 0
        self._folder = folder
        self._dtype = _dtype(tokenizer)
        self._end = np.array([tokenizer.end_of_document], self._dtype)
        self._writer = import_streaming("streaming").MDSWriter(
            out=str(folder),
            columns={"name": "str", "tokens": "bytes"},
            compression=COMPRESSION[settings.compression],
            hashes=["xxh64"],
            size_limit=settings.shard_size,
            max_workers=1,
        )

    def add(self, document: Document, tokens: np.ndarray[Any, Any]) -> None:
        full = np.concatenate([tokens.astype(self._dtype), self._end])
        if full.nbytes >= 2**31:
            raise PrepareError(f"{document.name} has {len(full)} tokens; a document holds at most 2**31 bytes of them")
        self._writer.write({"name": document.name, "tokens": full.tobytes()})
        self.lengths.append(len(full))
        self.text_bytes += len(document.text.encode("utf-8"))

    def finish(self) -> SplitEntry:
        self._writer.finish()
        lengths = np.array(self.lengths, "<i8")
        np.save(self._folder / LENGTHS_FILE, lengths)
        index = json.loads((self._folder / INDEX_FILE).read_text("utf-8"))
        shards, first = [], 0
        for shard in index["shards"]:
            last = first + shard["samples"]
            tokens = int(lengths[first:last].sum())
            raw = _streaming_entry(shard["raw_data"])
            compressed = _streaming_entry(shard["zip_data"]) if shard["zip_data"] else None
            shards.append(ShardEntry(shard["samples"], tokens, raw, compressed))
            first = last
        return SplitEntry(
            documents=len(lengths),
            tokens=int(lengths.sum()),
            text_bytes=self.text_bytes,
            shards=tuple(shards),
            index=describe_file(self._folder / INDEX_FILE),
            lengths=describe_file(self._folder / LENGTHS_FILE),
        )

    def close(self) -> None:
        self._writer.executor.shutdown(wait=False, cancel_futures=True)


def _streaming_entry(data: dict[str, Any]) -> FileEntry:
    return FileEntry(data["basename"], data["bytes"], data["hashes"]["xxh64"])
