"""The verified store: documents by number, from shards that agree with the manifest in size and hash.

mosaicml-streaming fetches, decompresses and caches; its iterator is not used, because it only logs a bad shard and
stops. Here every shard is checked when a process first opens it, in the calling thread, and whatever is wrong is
raised. A check that passed is remembered in a marker file, by size and times of the checked file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from data_prep.manifest import FILE_NAME, FileEntry, Manifest, ManifestError, ShardEntry, describe_file, hash_stream
from titans_train.data.errors import DataError
from titans_train.data.shim import import_streaming

REMEDY = "copy the file again from where the data was prepared, or prepare the data again"
_DOWNLOAD_SECONDS = 300.0
_REMOTE_ATTEMPTS = 3

Tokens = NDArray[np.unsignedinteger[Any]]


def is_remote(path: str) -> bool:
    return "://" in path


class ShardStore:
    """Documents of one split of a prepared folder, local or remote. Cheap to send to another process."""

    def __init__(self, path: str, split: str, cache: Path) -> None:
        """Read the manifest of `path`; `cache` takes decompressed shards, fetched files and markers.

        DataError: no such folder, not a prepared one, or another version.
        """
        self.path = path if is_remote(path) else str(Path(path).expanduser().absolute())
        self.split = split
        text = self._manifest_text(cache)
        try:
            self.manifest = Manifest.from_text(text, f"{self.path}/{FILE_NAME}")
        except ManifestError as error:
            raise DataError(str(error)) from error
        self.split = split = f"{split}/text"
        self.entry = self.manifest.splits[split.partition("/")[0]]["text"]
        self.fingerprint = text_hash(text)
        # Named by content, so that one cache folder can serve several data sets, and changed data starts anew.
        self.cache = cache.expanduser().absolute() / self.fingerprint
        self._first = np.cumsum([0, *(shard.documents for shard in self.entry.shards)])
        self._check_present()
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._open: dict[int, Any] = {}  # shard number -> streaming's MDSReader, verified by this process
        self._lock = threading.Lock()

    def _check_present(self) -> None:
        """A missing shard of a local folder is refused at once; its content is checked when it is opened."""
        if is_remote(self.path):
            return
        folder = Path(self.path) / self.split
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        missing = [shard.stored.name for shard in self.entry.shards if shard.stored.name not in present]
        if missing:
            more = f" and {len(missing) - 1} more shards" if len(missing) > 1 else ""
            raise DataError(f"shard {folder}/{missing[0]}{more} is missing; {REMEDY}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def documents_per_shard(self) -> NDArray[np.int64]:
        return np.diff(self._first).astype(np.int64)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, mapped from the verified file. DataError when it disagrees with the manifest."""
        path = self._verified(self.entry.lengths, self._in_place(self.entry.lengths))
        lengths: NDArray[np.int64] = np.load(path, mmap_mode="r")
        if len(lengths) != self.entry.documents or int(lengths.sum()) != self.entry.tokens:
            raise DataError(
                f"{path}: {len(lengths)} documents of {int(lengths.sum())} tokens, the manifest says "
                f"{self.entry.documents} of {self.entry.tokens}; prepare the data again"
            )
        return lengths

    def document(self, number: int, length: int) -> Tokens:
        """All tokens of a document, its end-of-document token included. DataError when they are not `length`."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        reader = self._reader(shard)
        name = self.entry.shards[shard].raw.name
        try:
            data = reader.get_item(number - int(self._first[shard]))["tokens"]
            tokens = np.frombuffer(data, self._dtype)
        except (OSError, IndexError, ValueError) as error:
            raise DataError(f"shard {self.split}/{name} changed while the run read it ({error}); {REMEDY}") from error
        if len(tokens) != length or tokens[-1] != self.manifest.tokenizer.end_of_document:
            raise DataError(
                f"shard {self.split}/{name}, document {number}: expected {length} tokens that end with "
                f"{self.manifest.tokenizer.end_of_document}, found {len(tokens)}; {REMEDY}"
            )
        if (largest := int(tokens.max())) >= self.manifest.tokenizer.vocabulary:
            raise DataError(
                f"shard {self.split}/{name}, document {number}: token {largest}, expected below "
                f"{self.manifest.tokenizer.vocabulary}; {REMEDY}"
            )
        return tokens

    def _reader(self, number: int) -> Any:
        with self._lock:
            if number not in self._open:
                shard = self.entry.shards[number]
                if shard.compressed is None:
                    path = self._verified(shard.raw, self._in_place(shard.raw))
                else:
                    path = self._decompressed(shard)
                self._open[number] = self._mds_reader(shard, path.parent.parent.parent)
            return self._open[number]

    def _in_place(self, file: FileEntry) -> Path | None:
        """Where a file of a local folder lies; None for a remote one."""
        return None if is_remote(self.path) else Path(self.path) / self.split / file.name

    def _cached(self, file: FileEntry) -> Path:
        return self.cache / self.split / file.name

    def _verified(self, file: FileEntry, in_place: Path | None) -> Path:
        """A stored file as it is: a local one where it lies, a remote one in the cache."""
        with self._guard(file):
            path = in_place or self._cached(file)
            if in_place is None and (not path.exists() or self._problem(path, file)):
                path.unlink(missing_ok=True)
                self._fetch(f"{self.split}/{file.name}", path)
            if problem := self._problem(path, file):
                raise DataError(f"shard file {path} {problem}; {REMEDY}")
            return path

    def _decompressed(self, shard: ShardEntry) -> Path:
        """The raw form of a compressed shard, in the cache. A damaged cached copy is made anew, once."""
        path = self._cached(shard.raw)
        with self._guard(shard.raw):
            if path.exists() and self._problem(path, shard.raw) is None:
                return path
            path.unlink(missing_ok=True)
            self._check_space(shard)
            self._prepare(shard)
            if problem := self._problem(path, shard.raw):
                path.unlink(missing_ok=True)
                raise DataError(f"shard {self.split}/{shard.raw.name}, decompressed, {problem}; {REMEDY}")
            return path

    def _prepare(self, shard: ShardEntry) -> None:
        """Fetch and decompress through streaming; explain a failure by looking at the compressed file itself."""
        assert shard.compressed is not None
        zipped = self._cached(shard.compressed)
        zipped.unlink(missing_ok=True)  # left by a killed run: nobody vouches for it
        stream = import_streaming("streaming").Stream(
            remote=self.path,
            local=str(self.cache),
            split=self.split,
            download_retry=_REMOTE_ATTEMPTS if is_remote(self.path) else 1,
            download_timeout=_DOWNLOAD_SECONDS,
            validate_hash="xxh64",
            keep_zip=False,
        )
        source = f"{self.path}/{self.split}/{shard.compressed.name}"
        try:
            stream.prepare_shard(self._mds_reader(shard, self.cache))
        except Exception as error:  # each storage client and compression library has errors of its own
            problem = _difference(zipped, shard.compressed) if zipped.exists() else None
            zipped.unlink(missing_ok=True)
            if isinstance(error, FileNotFoundError):
                problem = "is missing"
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise self._no_space(shard) from error
            detail = problem or f"cannot be read ({type(error).__name__}: {error})"
            raise DataError(f"shard {source} {detail}; {REMEDY}") from error

    def _check_space(self, shard: ShardEntry) -> None:
        if shutil.disk_usage(self.cache).free < shard.raw.bytes + shard.stored.bytes:
            raise self._no_space(shard)

    def _no_space(self, shard: ShardEntry) -> DataError:
        needed, free = shard.raw.bytes + shard.stored.bytes, shutil.disk_usage(self.cache).free
        return DataError(
            f"the disk of the data cache {self.cache} has {free / 1e6:,.1f} MB free, shard {shard.raw.name} needs "
            f"{needed / 1e6:,.1f} MB; free space or set data.cache to a folder on another disk"
        )

    def _mds_reader(self, shard: ShardEntry, folder: Path) -> Any:
        info = import_streaming("streaming.base.format.base.reader").FileInfo
        raw, zipped = (
            info(file.name, file.bytes, {"xxh64": file.xxh64}) if file is not None else None
            for file in (shard.raw, shard.compressed)
        )
        return import_streaming("streaming.base.format.mds.reader").MDSReader(
            dirname=str(folder),
            split=self.split,
            column_encodings=["str", "bytes"],
            column_names=["name", "tokens"],
            column_sizes=[None, None],
            compression="zstd" if zipped is not None else None,
            hashes=["xxh64"],
            raw_data=raw,
            samples=shard.documents,
            size_limit=None,
            zip_data=zipped,
        )

    def _guard(self, file: FileEntry) -> FileLock:
        """One process of a node at a time fetches, decompresses or checks a file; a killed one lets go."""
        path = self._cached(file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot make the data cache {path.parent}: {error.strerror}; set data.cache") from error
        return FileLock(f"{path}.lock")

    def _problem(self, path: Path, file: FileEntry) -> str | None:
        """None when `path` is as the manifest says (now, or when the marker was written and unchanged since)."""
        marker = self._cached(file).with_name(file.name + ".checked")
        try:
            state = json.dumps([file.xxh64, *_state(path)])
            if marker.is_file() and marker.read_text("utf-8") == state:
                return None
        except OSError:
            pass  # _difference says what is wrong
        if (problem := _difference(path, file)) is None:
            temporary = marker.with_suffix(".new")
            with contextlib.suppress(OSError):  # without a marker the next process checks again
                temporary.write_text(state, "utf-8")
                os.replace(temporary, marker)
        return problem

    def _manifest_text(self, cache: Path) -> str:
        remedy = "set data.path to a folder made by python -m data_prep"
        try:
            if not is_remote(self.path):
                return (Path(self.path) / FILE_NAME).read_text("utf-8")
            target = cache.expanduser().absolute() / f"manifest.{os.getpid()}.json"
            target.unlink(missing_ok=True)
            self._fetch(FILE_NAME, target)
            text = target.read_text("utf-8")
            target.unlink()
            return text
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self.path}/{FILE_NAME} ({error}); {remedy}") from error

    def _fetch(self, name: str, target: Path) -> None:
        downloader = import_streaming("streaming.base.storage").CloudDownloader
        source = f"{self.path}/{name}"
        for attempt in range(1, _REMOTE_ATTEMPTS + 1):
            try:
                downloader.direct_download(source, str(target), _DOWNLOAD_SECONDS)
                return
            except Exception as error:  # each storage client has errors of its own
                if attempt == _REMOTE_ATTEMPTS:
                    raise DataError(f"cannot fetch {source} ({type(error).__name__}: {error}); {REMEDY}") from error


def text_hash(text: str) -> str:
    """xxh64 of a text, 16 hex digits."""
    return hash_stream(io.BytesIO(text.encode("utf-8")))[1]


def _state(path: Path) -> list[int]:
    """Changes when the file was written to or replaced, even where its modification time was put back."""
    info = path.stat()
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _difference(path: Path, file: FileEntry) -> str | None:
    """What is wrong with a file, None when size and hash are as the manifest says."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"has {size} bytes, expected {file.bytes}"
        found = describe_file(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if found.xxh64 == file.xxh64 else f"is damaged: xxh64 {found.xxh64}, expected {file.xxh64}"
