"""Files by path or URL: local disk, and S3 (also its work-alikes) through pyarrow's file system.

Every failure of listing, opening, reading or writing is a StorageError with the path and the remedy. S3 clients are
made on first use, one per process and setting, and never at import: they do not survive a fork.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, cast

import pyarrow as pa
import pyarrow.fs as pafs

from data_prep.addresses import is_remote
from data_prep.durable import whole_file
from data_prep.pieces import Unpacked, gunzip, unzstd
from data_prep.s3 import client, delete_object
from data_prep.storage_errors import StorageError, describe

BLOCK_BYTES = 8 << 20  # of one read or write: S3 answers each read with one request
Compression = Literal["gzip", "zstd"]
_S3 = "s3://"


@dataclass(frozen=True)
class FileInfo:
    path: str  # local path or URL
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class FileState:
    """What changes when a file is written. `mtime_ns` of S3 has whole seconds; 0 where the storage tells none."""

    bytes: int
    mtime_ns: int
    etag: str = ""


def join(base: str, *parts: str) -> str:
    """`base` and the parts with one slash between each."""
    return "/".join([base.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(path: str) -> str:
    """The path from the root of the disk, or the URL without a last slash."""
    return path.rstrip("/") if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def printable(name: str) -> str:
    """A path or name as text that can be written anywhere: bytes of it that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def locate(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of an s3:// URL, and the path inside it.

    The S3 endpoint is AWS_ENDPOINT_URL_S3, S3_ENDPOINT_URL or AWS_ENDPOINT_URL; credentials and region come from the
    usual AWS environment and files. Without credentials AWS_NO_SIGN_REQUEST=true reads public buckets.
    """
    inner = path.removeprefix(_S3).rstrip("/")
    bucket = inner.partition("/")[0]
    if not path.startswith(_S3) or not bucket:
        raise StorageError(f"{path}: not a known address; known are local paths and s3://BUCKET/KEY")
    with _translated(path):
        return client(bucket), inner


def exists(path: str) -> bool:
    """Whether a file or folder is there."""
    if not is_remote(path):
        return os.path.exists(absolute(path))
    files, inner = locate(path)
    with _translated(path):
        return files.get_file_info(inner).type != pafs.FileType.NotFound


def list_files(path: str, skipped_folders: Collection[str] = ()) -> list[FileInfo]:
    """The file itself, or all files below a folder, sorted by path.

    Names that start with "." and folders named in `skipped_folders` are left out below the folder; local links to
    folders are not followed.
    """
    with _translated(path):
        found = _list_s3(path, skipped_folders) if is_remote(path) else _list_local(absolute(path), skipped_folders)
        return sorted(found, key=lambda info: info.path)


class StorageFile(io.RawIOBase):
    """A file of `size` bytes, open for reading at any position; use it as a context."""

    def __init__(self, path: str) -> None:
        self._path = path
        with _translated(path):
            # Python opens paths that are no UTF-8, the library does not.
            self._file: Any = _open_s3(path) if is_remote(path) else open(absolute(path), "rb", buffering=0)  # noqa: SIM115
            self.state = _remote_state(self._file) if is_remote(path) else _local_state(path)
        self.size = self.state.bytes

    def state_now(self) -> FileState:
        """As `state`, which was read when the file was opened."""
        with _translated(self._path):
            if not is_remote(self._path):
                return _local_state(self._path)
            with _open_s3(self._path) as file:
                return _remote_state(file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _translated(self._path):
            self._file.seek(offset, whence)
            return self.tell()

    def read(self, size: int = -1, /) -> bytes:
        """Up to `size` bytes, all that is left for -1; b"" at the end."""
        with _translated(self._path):
            data: bytes = self._file.read(None if size is None or size < 0 else size)
            return data

    def readinto(self, buffer: Any, /) -> int:
        with _translated(self._path):
            return int(self._file.readinto(buffer))

    def close(self) -> None:
        super().close()
        if hasattr(self, "_file"):
            self._file.close()


def open_input(path: str) -> StorageFile:
    """A file for reading at any position."""
    return StorageFile(path)


@contextlib.contextmanager
def open_stream(path: str, compression: Compression | None = None) -> Iterator[IO[bytes]]:
    """A file for reading from begin to end, decompressed; damaged content as in `decompress`."""
    with open_input(path) as file:
        yield decompress(file, compression)


def decompress(file: StorageFile, compression: Compression | None) -> IO[bytes]:
    """The content of an open file from begin to end.

    Reading damaged content raises an OSError that is no StorageError, after all that comes before the damage. zstd
    windows go up to 128 MiB (--long=27).
    """
    stream = cast(IO[bytes], io.BufferedReader(file, BLOCK_BYTES))
    if compression is None:
        return stream
    return cast(IO[bytes], Unpacked(gunzip(stream) if compression == "gzip" else unzstd(stream)))


def read_bytes(path: str) -> bytes:
    """The whole content of a small file."""
    with open_input(path) as file:
        return file.read()


def write_bytes(path: str, data: bytes) -> None:
    """Write a small file, whole or not at all; folders above it are made."""
    _write(path, io.BytesIO(data), len(data))


def upload(local: Path, path: str) -> None:
    """Copy a local file of any size to a path or URL, whole or not at all; folders above it are made."""
    with _translated(str(local)):
        stream = local.open("rb")
    with stream:
        _write(path, stream, os.fstat(stream.fileno()).st_size)


def delete(path: str) -> None:
    """Remove a file; nothing happens where there is none."""
    with _translated(path), contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            delete_object(locate(path)[1])
        else:
            os.unlink(absolute(path))


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        no_bucket = isinstance(error, FileNotFoundError) and is_remote(path) and not _bucket_exists(path)
        raise StorageError(describe(printable(path), error, no_bucket)) from error


def _write(path: str, source: IO[bytes], size: int) -> None:
    with _translated(path):
        if is_remote(path):
            _write_s3(path, source, size)
        else:
            _write_local(Path(path).expanduser(), source)


def _write_local(path: Path, source: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as target:
        shutil.copyfileobj(source, target, BLOCK_BYTES)


def _write_s3(path: str, source: IO[bytes], size: int) -> None:
    files, inner = locate(path)
    target = files.open_output_stream(inner)
    try:
        with target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        if (stored := files.get_file_info(inner).size) != size:
            raise StorageError(f"{path}: {stored} bytes arrived, {size} were sent; run again")
    except BaseException:
        # Closing the stream has completed the object with what was written so far.
        with contextlib.suppress(OSError):
            delete_object(inner)
        raise


def _list_local(root: str, skipped_folders: Collection[str]) -> Iterator[FileInfo]:
    def fail(error: OSError) -> None:
        raise error

    if not os.path.isdir(root):
        state = os.stat(root)
        yield FileInfo(root, state.st_size, state.st_mtime_ns)
        return
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped_folders]
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isfile(path):
                state = os.stat(path)
                yield FileInfo(path, state.st_size, state.st_mtime_ns)


def _list_s3(path: str, skipped_folders: Collection[str]) -> Iterator[FileInfo]:
    files, inner = locate(path)
    root = files.get_file_info(inner)
    if root.type == pafs.FileType.NotFound:
        raise FileNotFoundError(path)
    if root.type == pafs.FileType.File:
        yield FileInfo(absolute(path), root.size, root.mtime_ns)
        return
    for info in files.get_file_info(pafs.FileSelector(inner, recursive=True)):
        parts = info.path.removeprefix(inner).strip("/").split("/")
        if info.is_file and not any(part.startswith(".") for part in parts) and not {*parts[:-1]} & {*skipped_folders}:
            yield FileInfo(_S3 + info.path, info.size, info.mtime_ns)


def _local_state(path: str) -> FileState:
    state = os.stat(absolute(path))
    return FileState(state.st_size, state.st_mtime_ns)


def _open_s3(path: str) -> Any:
    files, inner = locate(path)
    return files.open_input_file(inner)


def _remote_state(file: Any) -> FileState:
    """From the answer that opening the object got."""
    told = {key: value.decode("latin-1") for key, value in (file.metadata() or {}).items()}
    try:
        time_ns = int(datetime.fromisoformat(told.get("Last-Modified", "")).timestamp()) * 10**9
    except ValueError:
        time_ns = 0
    return FileState(file.size(), time_ns, told.get("ETag", ""))


def _bucket_exists(path: str) -> bool:
    files, inner = locate(path)
    with _translated(path):
        return bool(files.get_file_info(inner.partition("/")[0]).type != pafs.FileType.NotFound)
