"""The verb `verify-data`: is every byte of a prepared folder as it was written? All that is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from data_prep.addresses import is_remote
from data_prep.manifest import (
    FILE_NAME,
    SPLITS,
    FileEntry,
    Manifest,
    ManifestError,
    ShardEntry,
    SplitEntry,
    hash_stream,
)
from data_prep.manifest_checks import shown
from titans_train.data import s3
from titans_train.data.cache import Cache
from titans_train.data.checked import wrong_size
from titans_train.data.errors import DataError
from titans_train.data.inspection import shard_problems
from titans_train.data.lengths import read_lengths
from titans_train.data.remote import Remote
from titans_train.data.verified import read_manifest
from titans_train.data.verify_report import Report, SourceRow, lines, source_row
from titans_train.untrusted import parse_json

_FETCHES = 3  # of an object whose content is wrong
_BLOCK_BYTES = 1 << 20


def main(args: Sequence[str]) -> int:
    """Exit status: 0 all is right, 1 something is wrong. DataError: not a prepared folder, or --json is no place."""
    parser = argparse.ArgumentParser(prog="python -m titans_train verify-data", description=__doc__)
    parser.add_argument("path", metavar="PATH|URL", help="a prepared folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="shards at once")
    options = parser.parse_args(list(args))
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: must be at least 1")
    if options.json is not None:
        _check_place(options.json)
    report = verify(options.path, None, print, options.threads)
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise DataError(f"--json {options.json}: {error.strerror}; name another file") from error
    return 1 if report.problems else 0


def _check_place(file: Path) -> None:
    """Before the work: a file that can be written."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a folder" if file.is_dir() else f"there is no folder {file.absolute().parent}"
        raise DataError(f"--json {file}: {what}; name a file in a folder that is there")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise DataError(f"--json {file}: permission denied; name a file that can be written")


def verify(
    path: str, cache: Cache | None, say: Callable[[str], None] = print, threads: int = 1, remote: Remote | None = None
) -> Report:
    """Check every file, shard and document of a prepared folder, local or remote.

    A shard is decompressed in memory, one per thread; a remote file is fetched to `cache`, or to a temporary folder,
    and removed. DataError: `path` is not a prepared folder.
    """
    started = time.monotonic()
    path = path.rstrip("/") if is_remote(path) else str(Path(path).expanduser().absolute())
    with contextlib.ExitStack() as stack:
        work = cache or Cache(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="titans-verify-"))))
        check = _Check(path, work, remote or Remote())
        problems, rows = check.run(threads)
        notes = check.notes
    manifest = check.manifest
    seconds = time.monotonic() - started
    tokenizer, settings = asdict(manifest.tokenizer), manifest.settings
    report = Report(path, tuple(problems), tuple(notes), tuple(rows), tokenizer, manifest.tool, settings, seconds)
    for line in lines(report):
        say(line)
    return report


class _Check:
    """One look at a folder."""

    def __init__(self, path: str, cache: Cache, remote: Remote) -> None:
        self._path, self._cache, self._remote = path, cache, remote
        self.notes: list[str] = []
        where = f"{path}/{FILE_NAME}"
        try:
            self.manifest = Manifest.from_text(read_manifest(path, cache, remote), where)
        except (ManifestError, DataError) as error:
            raise DataError(_plain(str(error))) from error
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")

    def run(self, threads: int) -> tuple[list[str], list[SourceRow]]:
        """(problems, rows of the table)."""
        problems, rows = [*self._tokenizer(), *self._unknown()], []
        for file in self.manifest.others:
            problems += self._content(file.name, file, keep=False)[1]
        with ThreadPoolExecutor(threads) as pool:
            for split, sources in self.manifest.splits.items():
                for source, entry in sources.items():
                    folder = f"{split}/{source}"
                    rows.append(source_row(split, source, entry))
                    problems += self._text_bytes(folder, entry) + self._index(folder, entry)
                    lengths, found = self._lengths(folder, entry)
                    problems += found
                    jobs = self._jobs(folder, entry, lengths)
                    problems += [text for found in pool.map(lambda job: self._shard(*job), jobs) for text in found]
        return problems, rows

    def _content(self, name: str, file: FileEntry, keep: bool = True) -> tuple[bytes, list[str]]:
        """(content if it is to be kept, problems) of a stored file; a remote one is fetched."""
        found = ""
        for _ in range(_FETCHES if is_remote(self._path) else 1):
            try:
                content, found = self._read(name, file, keep)
            except FileNotFoundError:
                return b"", [f"{name} is missing"]
            except (DataError, OSError) as error:
                return b"", [f"{name}: {_plain(str(error))}"]
            if not found:
                return content, []
        return b"", [f"{name} {found}"]

    def _read(self, name: str, file: FileEntry, keep: bool) -> tuple[bytes, str]:
        """(content, what is wrong with it)."""
        if not is_remote(self._path):
            return _compared(Path(self._path) / name, file, keep)
        target = self._cache.temporary(self._cache.make() / "verify" / Path(name).name)
        try:
            with self._cache.room(file.bytes):
                self._remote.fetch(f"{self._path}/{name}", target, file.bytes)
                return _compared(target, file, keep)
        finally:
            target.unlink(missing_ok=True)

    def _tokenizer(self) -> list[str]:
        """Its file and its sha256, which covers what the file means."""
        from data_prep.tokenizer import prepared_tokenizer

        entry = self.manifest.tokenizer
        with tempfile.TemporaryDirectory(prefix="titans-verify-") as folder:
            if entry.file is not None:
                content, problems = self._content(entry.file.name, entry.file)
                if problems:
                    return problems
                (Path(folder) / entry.file.name).write_bytes(content)
            try:
                prepared_tokenizer(entry, Path(folder))
            except ValueError as error:  # PrepareError is one
                return [f"tokenizer: {error}".replace(folder, self._path)]
        return []

    def _unknown(self) -> list[str]:
        """Files, and folders without files, that the manifest does not name; hidden ones may be there."""
        from data_prep.storage import printable

        known = {FILE_NAME, *(name for name, _ in self.manifest.files())}
        folders = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents} | {*SPLITS}
        if not is_remote(self._path):
            found = set(_below(Path(self._path), folders))
        elif self._path.startswith("s3://"):
            try:
                found = set(s3.list_keys(self._path, self._remote.timeout_seconds))
            except Exception as error:  # the fetches below say more
                self.notes.append(f"the folder could not be listed ({error}): unknown files were not looked for")
                return []
        else:
            self.notes.append("this storage cannot be listed: unknown files were not looked for")
            return []
        unknown = sorted(name for name in found - known if name.rstrip("/") not in folders | {""})
        shown = [printable(name) for name in unknown if not any(part.startswith(".") for part in name.split("/"))]
        return [f"{name} is not in the manifest: remove it, or prepare the data again" for name in shown]

    def _text_bytes(self, folder: str, entry: SplitEntry) -> list[str]:
        """A token of the byte tokenizer is a byte of text or the end of a document."""
        expected = entry.tokens - entry.documents
        if self.manifest.tokenizer.kind != "bytes" or entry.text_bytes == expected:
            return []
        return [f"{folder}: {entry.text_bytes} bytes of text in the manifest, its tokens are {expected} bytes"]

    def _index(self, folder: str, entry: SplitEntry) -> list[str]:
        """streaming's own index must say the same as the manifest."""
        name = f"{folder}/{entry.index.name}"
        content, problems = self._content(name, entry.index)
        if problems:
            return problems
        try:
            shards = [_indexed(shard) for shard in parse_json(content)["shards"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return [f"{name} is not an index of mosaicml-streaming ({type(error).__name__}: {shown(str(error))})"]
        expected = [(shard.documents, shard.raw, shard.compressed) for shard in entry.shards]
        if len(shards) != len(expected):
            return [f"{name} has {len(shards)} shards, the manifest says {len(expected)}"]
        return [
            f"{name}, shard {number}: {_words(*found)}; the manifest says {_words(*said)}"
            for number, (found, said) in enumerate(zip(shards, expected, strict=True))
            if found != said
        ]

    def _lengths(self, folder: str, entry: SplitEntry) -> tuple[NDArray[np.int64] | None, list[str]]:
        name = f"{folder}/{entry.lengths.name}"
        content, problems = self._content(name, entry.lengths)
        if problems:
            return None, problems
        try:
            return read_lengths(content, entry.documents), []
        except ValueError as error:
            return None, [f"{name}: {error}"]

    def _jobs(
        self, folder: str, entry: SplitEntry, lengths: NDArray[np.int64] | None
    ) -> Iterator[tuple[str, ShardEntry, NDArray[np.int64] | None]]:
        first = 0
        for shard in entry.shards:
            last = first + shard.documents
            yield folder, shard, None if lengths is None else lengths[first:last]
            first = last

    def _shard(self, folder: str, shard: ShardEntry, lengths: NDArray[np.int64] | None) -> list[str]:
        name = f"{folder}/{shard.stored.name}"
        content, problems = self._content(name, shard.stored)
        if problems:
            return problems
        if shard.compressed is not None:
            try:
                content = _decompressed(content, shard.raw.bytes)
            except zstandard.ZstdError as error:
                return [f"{name} cannot be decompressed ({error})"]
            expected = f"{shard.raw.bytes} bytes, xxh64 {shard.raw.xxh64}"
            if (found := f"{len(content)} bytes, xxh64 {xxhash.xxh64_hexdigest(content)}") != expected:
                return [f"{name}, decompressed, has {found}, expected {expected}"]
        found_in = shard_problems(content, shard, lengths, self._dtype, self.manifest.tokenizer)
        return [f"{name}: {text}" for text in found_in]


def _plain(text: str) -> str:
    """A remedy of the training's reader, for this command: it has a path where that has data.path."""
    return text.replace("set data.path to", "name").replace("data.path", "the path")


def _below(root: Path, known: set[str]) -> Iterator[str]:
    """Paths of all files, and of the folders with nothing in them but hidden files; none below a hidden folder."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = [name for name in names if not name.startswith(".")]
        place = Path(folder).relative_to(root)
        yield from ((place / name).as_posix() for name in shown)
        yield from ((place / name).as_posix() for name in folders if (Path(folder) / name).is_symlink())
        if not folders and not shown and place.as_posix() not in known:
            yield place.as_posix()


def _compared(path: Path, file: FileEntry, keep: bool) -> tuple[bytes, str]:
    """(content if it is to be kept, how it differs from the manifest's entry); a file of another size is not read."""
    if (found := wrong_size(path, file)) is not None:
        return b"", found
    content = path.read_bytes() if keep else b""
    if keep:
        digest = xxhash.xxh64_hexdigest(content)
    else:
        with path.open("rb") as stream:
            digest = hash_stream(stream)[1]
    if digest != file.xxh64:
        return b"", f"is damaged: xxh64 {digest}, expected {file.xxh64}"
    return content, ""


def _decompressed(content: bytes, size: int) -> bytes:
    """At most a byte more than expected: a damaged header may promise anything."""
    found = bytearray()
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        while len(found) <= size and (block := reader.read(min(_BLOCK_BYTES, size + 1 - len(found)))):
            found += block
    return bytes(found)


def _indexed(shard: dict[str, Any]) -> tuple[int, FileEntry, FileEntry | None]:
    raw, compressed = (
        FileEntry(data["basename"], data["bytes"], data["hashes"]["xxh64"]) if data else None
        for data in (shard["raw_data"], shard["zip_data"])
    )
    if raw is None:
        raise ValueError("a shard without raw_data")
    if not all(str(file.name).isprintable() for file in (raw, compressed) if file is not None):
        raise ValueError(f"a file is called {shown(raw.name)}")
    return shard["samples"], raw, compressed


def _words(documents: int, raw: FileEntry, compressed: FileEntry | None) -> str:
    files = [f"{file.name} of {file.bytes} bytes, xxh64 {file.xxh64}" for file in (raw, compressed) if file is not None]
    return f"{documents} documents, " + ", compressed ".join(files)
