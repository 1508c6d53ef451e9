"""The files of a prepared folder, local or remote: only such as agree with the manifest in size and hash.

mosaicml-streaming's own preparing of shards is not used: it only logs a bad one. What is wrong is raised here, in the
calling thread. A file in the cache gets its name when it has been checked, so a half or a damaged one has none.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from data_prep.addresses import is_remote
from data_prep.manifest import FILE_NAME, LARGEST, FileEntry, ShardEntry
from titans_train.data.cache import MARKER, Cache
from titans_train.data.checked import difference, problem, remembered, wrong_size
from titans_train.data.errors import DataError
from titans_train.data.remote import Remote
from titans_train.untrusted import read_bounded

REMEDY = "copy the file again from where the data was prepared, or prepare the data again"
_FETCHES = 3  # of an object whose content is wrong: a fault of the transfer heals, a damaged object does not
_BLOCK_BYTES = 1 << 20


def read_manifest(path: str, cache: Cache, remote: Remote) -> str:
    """The text of a folder's manifest, fetched anew where it is remote. DataError: there is none."""
    if not is_remote(path):
        try:
            return read_bounded(Path(path) / FILE_NAME, LARGEST).decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read {path}/{FILE_NAME} ({error}); set data.path to a folder made by python -m data_prep"
            ) from error
    target = cache.temporary(cache.make() / FILE_NAME)
    try:
        remote.fetch(f"{path}/{FILE_NAME}", target, LARGEST)
        return read_bounded(target, LARGEST).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}/{FILE_NAME} is not a manifest ({error}); prepare the data again") from error
    finally:
        target.unlink(missing_ok=True)


@dataclass(frozen=True)
class VerifiedFiles:
    """`path`: the prepared folder, or its URL. `name`: of its part of the cache; another one for other content.

    `folder` is a split and source, as train/text, in all methods; empty for what lies above them.
    """

    path: str
    name: str
    cache: Cache
    remote: Remote

    def raw_shard(self, folder: str, shard: ShardEntry) -> Path:
        """A shard ready to be read. DataError names the shard, what was expected and what was found."""
        if shard.compressed is None and not is_remote(self.path):
            return self._in_place(folder, shard.raw)
        return self._cached(folder, shard.raw, lambda target: self._make_shard(folder, shard, target), self.room(shard))

    def room(self, shard: ShardEntry) -> int:
        """Bytes that the cache needs while it makes a shard; 0 where it is read in place."""
        if not is_remote(self.path):
            return shard.raw.bytes if shard.compressed is not None else 0
        return shard.raw.bytes + (shard.compressed.bytes if shard.compressed is not None else 0)

    def copy(self, folder: str, file: FileEntry) -> Path:
        """A stored file in the cache, which many processes read. DataError as `raw_shard`."""
        return self._cached(folder, file, lambda target: self._bring(folder, file, target), file.bytes)

    def marker(self, folder: str, file: FileEntry) -> Path:
        """What remembers that a file was checked; its time says when it was used."""
        return self._place(folder, file).with_name(file.name + MARKER)

    def _place(self, folder: str, file: FileEntry) -> Path:
        return self.cache.folder / self.name / folder / file.name

    def _in_place(self, folder: str, file: FileEntry) -> Path:
        path, marker = Path(self.path) / folder / file.name, self.marker(folder, file)
        if remembered(path, file, marker):
            return path
        with self.cache.lock(str(marker)):
            if found := problem(path, file, marker, self.cache):
                raise DataError(f"shard file {path} {found}; {REMEDY}")
        return path

    def _cached(self, folder: str, file: FileEntry, make: Callable[[Path], None], needed: int) -> Path:
        """A file of the cache: the one that is there if it is good, else a new one, which `make` writes.

        `needed`: bytes, while it is made.
        """
        target, marker = self._place(folder, file), self.marker(folder, file)
        if remembered(target, file, marker):
            return target
        with self.cache.lock(str(target)):
            if target.exists() and problem(target, file, marker, self.cache) is None:
                return target
            target.unlink(missing_ok=True)
            partial = self.cache.temporary(target)
            try:
                with self._room(needed):
                    make(partial)
                    os.replace(partial, target)
                problem(target, file, marker, self.cache)  # remembers it
            finally:
                partial.unlink(missing_ok=True)
        return target

    def _make_shard(self, folder: str, shard: ShardEntry, target: Path) -> None:
        """Write the raw form of a shard."""
        if shard.compressed is None:
            self._bring(folder, shard.raw, target)
            return
        source = f"{self.path}/{folder}/{shard.compressed.name}"
        zipped = self.cache.temporary(target.with_name(shard.compressed.name))
        try:
            if is_remote(self.path):
                self._bring(folder, shard.compressed, zipped)
            elif found := difference(Path(source), shard.compressed):
                raise DataError(f"shard file {source} {found}; {REMEDY}")
            _decompress(zipped if is_remote(self.path) else Path(source), target, shard.raw.bytes)
        except zstandard.ZstdError as error:
            raise DataError(f"shard {source} cannot be decompressed ({error}); {REMEDY}") from error
        finally:
            zipped.unlink(missing_ok=True)
        if found := difference(target, shard.raw):
            raise DataError(f"shard {self.path}/{folder}/{shard.raw.name}, decompressed, {found}; {REMEDY}")

    def _bring(self, folder: str, file: FileEntry, target: Path) -> None:
        """A checked copy of a stored file at `target`."""
        source = "/".join(part for part in (self.path, folder, file.name) if part)
        if not is_remote(self.path):
            with contextlib.suppress(OSError):  # what is wrong is found below; a device's copy would never end
                if (found := wrong_size(Path(source), file)) is not None:
                    raise DataError(f"shard file {source} {found}; {REMEDY}")
            with contextlib.suppress(FileNotFoundError, PermissionError):
                shutil.copyfile(source, target)
            if found := difference(target, file):
                raise DataError(f"shard file {source} {found}; {REMEDY}")
            return
        for _ in range(_FETCHES):
            self.remote.fetch(source, target, file.bytes)
            if (found := difference(target, file)) is None:
                return
        raise DataError(f"shard file {source}, fetched {_FETCHES} times, {found}; {REMEDY}")

    @contextlib.contextmanager
    def _room(self, needed: int) -> Iterator[None]:
        with self.cache.room(needed):
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"the disk of the data cache {self.cache.folder} is full ({error.strerror}), {needed / 1e6:,.1f} "
                    "MB are needed; free space, set data.cache to another disk, or set data.cache_limit_gib"
                ) from error


def _decompress(zipped: Path, target: Path, size: int) -> None:
    """Write the content of a zstd file, at most a block more than `size` bytes of it."""
    with (
        zipped.open("rb") as source,
        target.open("wb") as out,
        zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader,
    ):
        written = 0
        while written <= size and (block := reader.read(_BLOCK_BYTES)):
            written += out.write(block)
