"""The folder of fetched and decompressed files: one part per user, with a limit, and clean after killed processes.

    <root>/u<uid>/<data set>/<split>/<source>/shard.00000.mds  shard.00000.mds.checked   (marker: `checked`)
    <root>/u<uid>/locks/…   flock-based: the kernel lets go of them with the process that held them

A file gets its final name when it is complete and verified. What is being made carries its maker's stamp (host,
process, start time) in its name, so that whatever a killed process left is known to be nobody's.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash
from filelock import FileLock, Timeout

from titans_train.data import shared_memory
from titans_train.data.errors import DataError

MARKER = ".checked"
_LOCKS = 256  # files; two shards may share one
_FOREIGN_SECONDS = 24 * 3600  # how long what another host is making stays,
_FOREIGN_ROOM_SECONDS = 3600  # and how long the room that it asked for counts
_OPENING_TRIES = 10
_WAIT_SECONDS = 600.0  # for room that other processes are filling, and for a lock that they hold
_SILENT_SECONDS = 10.0  # of waiting for a lock; then it is said
_STAMP = re.compile(r"(?:\.part|shared|\.room-(?P<bytes>\d+))~(?P<host>[0-9a-f]{16})-(?P<pid>\d+)-(?P<started>\d+)-")
_GIB = 2**30
_numbers = itertools.count()


@dataclass(frozen=True)
class Cache:
    """`root`: may be shared by users. `limit`: bytes that this user's files may take, None for no limit; the marker
    of a file just made, some 100 bytes, may come on top.

    Before a file is made, the least recently used ones go, whichever data set they belong to. A process that has a
    removed file open keeps it until it closes it.
    """

    root: Path
    limit: int | None = None

    @property
    def folder(self) -> Path:
        """This user's part."""
        return self.root.expanduser().absolute() / f"u{os.getuid()}"

    def make(self) -> Path:
        """This user's part, which now exists. DataError: it cannot be made, or belongs to another user."""
        folder = self.folder
        try:
            if not folder.is_dir():
                _make_in_shared(folder)
            with tempfile.TemporaryFile(dir=folder) as probe:
                ours = os.fstat(probe.fileno()).st_uid == folder.lstat().st_uid
        except OSError as error:
            raise DataError(
                f"cannot write to the data cache {folder}: {error.strerror}; give write permission (chmod 1777 "
                f"{folder.parent} lets several users share it), or set data.cache to another folder"
            ) from error
        if not ours or folder.is_symlink():
            raise DataError(
                f"the data cache {folder} belongs to user {folder.lstat().st_uid}, this process runs as "
                f"{os.getuid()}; set data.cache to another folder"
            )
        return folder

    def clean(self) -> int:
        """Remove the half made files that killed processes left; the number of them. A living process's stay."""
        removed = 0
        for entry in _files(self.make()):
            if (match := _STAMP.search(entry.name)) and not _living(match, entry):
                Path(entry.path).unlink(missing_ok=True)
                removed += 1
        return removed

    def lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        """One process of this user at a time works on `key`, and waits here for the others. Hold one key at a time.

        DataError: another one has held it for _WAIT_SECONDS.
        """
        return self._lock_file(f"{xxhash.xxh64_intdigest(key) % _LOCKS:03}")

    @contextlib.contextmanager
    def _lock_file(self, name: str) -> Iterator[None]:
        folder = self.make() / "locks"
        lock = FileLock(folder / name)
        try:
            folder.mkdir(exist_ok=True)
            try:
                lock.acquire(timeout=min(_SILENT_SECONDS, _WAIT_SECONDS))
            except Timeout:
                text = f"waiting for {folder / name}, which another process of this user holds"
                print(text, file=sys.stderr, flush=True)
                lock.acquire(timeout=max(_WAIT_SECONDS - _SILENT_SECONDS, 0))
        except Timeout as error:
            raise DataError(
                f"{folder / name} was held by another process for {_WAIT_SECONDS:.0f} s: a stopped or hung one of "
                f"yours; find it with fuser {folder / name} and end it, or set data.cache to another folder"
            ) from error
        except OSError as error:
            raise DataError(
                f"cannot make the lock file {folder / name} ({error.strerror}); free space on the disk of the data "
                "cache, or set data.cache to another folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def temporary(self, path: Path) -> Path:
        """A name beside `path` for what will become it; its folder now exists."""
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f"{path.name}.part~{_stamp()}")

    def check_room(self, needed: int) -> None:
        """DataError when `needed` bytes, used at the same time, are more than the limit."""
        if self.limit is not None and needed > self.limit:
            raise DataError(
                f"data.cache_limit_gib {self.limit / _GIB:.4g} is less than the {needed / _GIB:.4g} GiB of data that "
                f"are in use at the same time; raise it to at least {needed / _GIB * 1.05:.4g}"
            )

    @contextlib.contextmanager
    def room(self, needed: int) -> Iterator[None]:
        """Room for files of `needed` bytes, kept until they have their final names. DataError: there is none."""
        self.check_room(needed)
        note = self._reserve(needed) if self.limit is not None else None
        try:
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise DataError(
                    f"the disk of the data cache {self.folder} has {free / 1e6:,.1f} MB free, a shard needs "
                    f"{needed / 1e6:,.1f} MB; free space, set data.cache to a folder on another disk, or set "
                    "data.cache_limit_gib, which keeps the cache small"
                )
            yield
        finally:
            if note is not None:
                note.unlink(missing_ok=True)

    def _reserve(self, needed: int) -> Path:
        deadline = time.monotonic() + _WAIT_SECONDS
        note = self.make() / f".room-{needed}~{_stamp()}"
        while True:
            with self._lock_file("room"):
                if self._evict(needed):
                    note.touch()
                    return note
            if time.monotonic() > deadline:
                raise DataError(
                    f"other processes have filled the data cache {self.folder} for {_WAIT_SECONDS:.0f} s: its limit of "
                    f"{(self.limit or 0) / _GIB:.4g} GiB leaves no {needed / 1e6:,.1f} MB; raise data.cache_limit_gib"
                )
            time.sleep(random.uniform(0.02, 0.1))

    def _evict(self, needed: int) -> bool:
        """Remove least recently used files until `needed` bytes fit; False when others are filling the room."""
        assert self.limit is not None
        files, used, total = [], {}, needed
        for entry in _files(self.folder):
            match = _STAMP.search(entry.name)
            if match is not None:  # half made files count with what was reserved for them
                total += int(match["bytes"] or 0) if _living(match, entry) else 0
                continue
            with contextlib.suppress(FileNotFoundError):
                info = entry.stat()
                total += info.st_size
                if entry.name.endswith(MARKER):
                    used[entry.path.removesuffix(MARKER)] = info.st_mtime
                else:
                    files.append((entry.path, info.st_size, info.st_mtime))
        files.sort(key=lambda file: used.get(file[0], file[2]))
        for path, size, _ in files:
            if total <= self.limit:
                break
            Path(path).unlink(missing_ok=True)
            Path(path + MARKER).unlink(missing_ok=True)
            total -= size
        return total <= self.limit


def note_shared_memory() -> None:
    """Write down what this process and those below it have in /dev/shm now, for `clean_shared_memory`.

    A run needs no note: without one, as on a full disk, what it would leave when killed stays.
    """
    with contextlib.suppress(OSError):
        if (folder := _notes()) is not None:
            (folder / f"shared~{_maker()}").write_text(shared_memory.listing(), "utf-8")


def clean_shared_memory() -> int:
    """Remove the shared memory that killed processes of this user noted on this node; the number of files."""
    removed = 0
    with contextlib.suppress(OSError):
        for entry in _files(folder) if (folder := _notes()) is not None else ():
            if (match := _STAMP.search(entry.name)) and not _living(match, entry):
                with contextlib.suppress(FileNotFoundError):
                    removed += shared_memory.remove(Path(entry.path).read_text("utf-8"))
                    Path(entry.path).unlink()
    return removed


def _notes() -> Path | None:
    """A folder of this node that only this user may write to; None where its name is taken. OSError: no room."""
    folder = Path(tempfile.gettempdir()) / f"titans-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    info = folder.lstat()
    ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077
    return folder if ours else None


def _make_in_shared(folder: Path) -> None:
    """Make a user's folder. The one above is like /tmp: everybody may make one in it, nobody remove another's."""
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(parents=True)
        folder.parent.chmod(0o1777)
    for _ in range(_OPENING_TRIES):
        with contextlib.suppress(PermissionError):  # another user may have made it just now, and opens it next
            folder.mkdir(mode=0o700, exist_ok=True)
            return
        time.sleep(0.05)
    folder.mkdir(mode=0o700, exist_ok=True)


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """All files below a folder; what vanishes meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry


def _stamp() -> str:
    return f"{_maker()}{next(_numbers)}"


def _maker() -> str:
    return f"{host()}-{os.getpid()}-{_started(os.getpid())}-"


def _living(stamp: re.Match[str], entry: os.DirEntry[str]) -> bool:
    """Whether the process that made a file may still be at work on it."""
    if stamp["host"] == host():
        return _started(int(stamp["pid"])) == int(stamp["started"])
    with contextlib.suppress(FileNotFoundError):
        return time.time() - entry.stat().st_mtime < (_FOREIGN_ROOM_SECONDS if stamp["bytes"] else _FOREIGN_SECONDS)
    return False


@lru_cache(maxsize=1)
def host() -> str:
    """Names this host since it started, and its space of process numbers: a container is another host."""
    return xxhash.xxh64_hexdigest(f"{host_name()}/{boot()}/{os.readlink('/proc/self/ns/pid')}")


def host_name() -> str:
    return socket.gethostname()


@lru_cache(maxsize=1)
def boot() -> str:
    """Another one each time that this host starts."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("utf-8").strip()


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since the host did; None when it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in b"ZX" else int(fields[19])
