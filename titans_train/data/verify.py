"""The verb `verify-data`: is every byte of a prepared folder as it was written? All that is wrong with it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from data_prep.manifest import FILE_NAME, FileEntry, Manifest, ManifestError, ShardEntry, SplitEntry
from titans_train.data import s3
from titans_train.data.cache import Cache
from titans_train.data.errors import DataError
from titans_train.data.inspection import shard_problems
from titans_train.data.remote import Remote, is_remote
from titans_train.data.verified import read_manifest
from titans_train.data.verify_report import Report, SourceRow, lines, source_row

_FETCHES = 3  # of an object whose content is wrong


def main(args: Sequence[str]) -> int:
    """Exit status: 0 all is right, 1 something is wrong. DataError: not a prepared folder."""
    parser = argparse.ArgumentParser(prog="python -m titans_train verify-data", description=__doc__)
    parser.add_argument("path", metavar="PATH|URL", help="a prepared folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as well")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="shards at once")
    options = parser.parse_args(list(args))
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: must be at least 1")
    report = verify(options.path, None, print, options.threads)
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    return 1 if report.problems else 0


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
        try:
            self.manifest = Manifest.from_text(read_manifest(path, cache, remote), f"{path}/{FILE_NAME}")
        except ManifestError as error:
            raise DataError(str(error)) from error
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")

    def run(self, threads: int) -> tuple[list[str], list[SourceRow]]:
        """(problems, rows of the table)."""
        problems, rows = [*self._tokenizer(), *self._unknown()], []
        with ThreadPoolExecutor(threads) as pool:
            for split, sources in self.manifest.splits.items():
                for source, entry in sources.items():
                    folder = f"{split}/{source}"
                    rows.append(source_row(split, source, entry))
                    problems += self._index(folder, entry)
                    lengths, found = self._lengths(folder, entry)
                    problems += found
                    jobs = self._jobs(folder, entry, lengths)
                    problems += [text for found in pool.map(lambda job: self._shard(*job), jobs) for text in found]
        return problems, rows

    def _content(self, name: str, file: FileEntry) -> tuple[bytes, list[str]]:
        """(content, problems) of a stored file; no content where there is a problem. A remote one is fetched."""
        found = ""
        for _ in range(_FETCHES if is_remote(self._path) else 1):
            try:
                content, found = self._read(name, file)
            except FileNotFoundError:
                return b"", [f"{name} is missing"]
            except (DataError, OSError) as error:
                return b"", [f"{name}: {error}"]
            if not found:
                return content, []
        return b"", [f"{name} {found}"]

    def _read(self, name: str, file: FileEntry) -> tuple[bytes, str]:
        """(content, what is wrong with it)."""
        if not is_remote(self._path):
            return _compared(Path(self._path) / name, file)
        target = self._cache.temporary(self._cache.make() / "verify" / Path(name).name)
        try:
            with self._cache.room(file.bytes):
                self._remote.fetch(f"{self._path}/{name}", target)
                return _compared(target, file)
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
        """Shard files that the manifest does not name."""
        known = {name for name, _ in self.manifest.files()}
        if not is_remote(self._path):
            found = {path.relative_to(self._path).as_posix() for path in Path(self._path).rglob("*.mds*")}
        elif self._path.startswith("s3://"):
            try:
                found = set(s3.list_keys(self._path, self._remote.timeout_seconds))
            except Exception as error:  # the fetches below say more
                self.notes.append(f"the folder could not be listed ({error}): unknown shard files were not looked for")
                return []
        else:
            self.notes.append("this storage cannot be listed: unknown shard files were not looked for")
            return []
        unknown = sorted(name for name in found - known if ".mds" in Path(name).name)
        return [f"{name} is not in the manifest: remove it, or prepare the data again" for name in unknown]

    def _index(self, folder: str, entry: SplitEntry) -> list[str]:
        """streaming's own index must say the same as the manifest."""
        name = f"{folder}/{entry.index.name}"
        content, problems = self._content(name, entry.index)
        if problems:
            return problems
        try:
            shards = [_indexed(shard) for shard in json.loads(content)["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            return [f"{name} is not an index of mosaicml-streaming ({type(error).__name__}: {error})"]
        expected = [(shard.documents, shard.raw, shard.compressed) for shard in entry.shards]
        if len(shards) != len(expected):
            return [f"{name} has {len(shards)} shards, the manifest says {len(expected)}"]
        return [
            f"{name}, shard {number}: {found}, the manifest says {said}"
            for number, (found, said) in enumerate(zip(shards, expected, strict=True))
            if found != said
        ]

    def _lengths(self, folder: str, entry: SplitEntry) -> tuple[NDArray[np.int64] | None, list[str]]:
        name = f"{folder}/{entry.lengths.name}"
        content, problems = self._content(name, entry.lengths)
        if problems:
            return None, problems
        try:
            lengths = np.load(io.BytesIO(content))
        except ValueError as error:
            return None, [f"{name} is not an array ({error})"]
        if lengths.shape != (entry.documents,) or lengths.dtype != np.int64:
            return None, [f"{name} is {lengths.dtype} {lengths.shape}, expected int64 ({entry.documents},)"]
        return lengths, []

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


def _compared(path: Path, file: FileEntry) -> tuple[bytes, str]:
    """(content, how it differs from the manifest's entry); a file of another size is not read."""
    if (size := path.stat().st_size) != file.bytes:
        return b"", f"has {size} bytes, expected {file.bytes}"
    content = path.read_bytes()
    if (digest := xxhash.xxh64_hexdigest(content)) != file.xxh64:
        return b"", f"is damaged: xxh64 {digest}, expected {file.xxh64}"
    return content, ""


def _decompressed(content: bytes, size: int) -> bytes:
    """At most a byte more than expected: a damaged header may promise anything."""
    with zstandard.ZstdDecompressor().stream_reader(content, read_across_frames=True) as reader:
        return reader.read(size + 1)


def _indexed(shard: dict[str, Any]) -> tuple[int, FileEntry, FileEntry | None]:
    raw, compressed = (
        FileEntry(data["basename"], data["bytes"], data["hashes"]["xxh64"]) if data else None
        for data in (shard["raw_data"], shard["zip_data"])
    )
    assert raw is not None
    return shard["samples"], raw, compressed
