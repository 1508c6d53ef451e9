"""Which files to read, and how their reading is shared out: into units, one process's piece of work each.

Everything is in sorted order and depends on names, sizes and times of change only, so the same input always gives
the same units. What a folder holds besides text is counted; what a user names and cannot be read is refused.
"""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import xxhash

from data_prep import storage
from data_prep.addresses import is_remote
from data_prep.errors import PrepareError
from data_prep.storage import Compression, FileInfo

TEXT_SUFFIXES = (".md", ".py", ".txt", ".txt.gz", ".txt.zst")
LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
SUFFIXES = (*TEXT_SUFFIXES, *LINES_SUFFIXES, ".parquet")
DEFAULT_SUFFIXES = (".py", ".txt")
DEFAULT_SKIPPED_FOLDERS = ("__pycache__", "dist-packages", "site-packages")
UNIT_BYTES = 64 << 20  # of files as they lie, compressed or not
UNIT_FILES = 1024

Kind = Literal["text", "lines", "parquet"]
Found = tuple[list["SourceFile"], dict[str, int], str]


@dataclass(frozen=True)
class SourceFile:
    path: str  # absolute local path or URL
    name: str  # path relative to the input it was found under, with that input's own last component in front
    bytes: int
    mtime_ns: int = 0

    @property
    def kind(self) -> Kind:
        """What its name says it holds; "lines" are JSON Lines."""
        if self.path.endswith(".parquet"):
            return "parquet"
        return "lines" if self.path.endswith(LINES_SUFFIXES) else "text"

    @property
    def compression(self) -> Compression | None:
        if self.path.endswith(".gz"):
            return "gzip"
        return "zstd" if self.path.endswith(".zst") else None

    def is_one_document(self, separator: str | None) -> bool:
        """Whether it is a document as a whole, rather than lines, rows or separated documents."""
        return self.kind == "text" and separator is None


@dataclass(frozen=True)
class Unit:
    """One process's piece of work: bytes [begin, end) of one file, or several small files as a whole.

    What begins in the range belongs to it: lines, separated documents, row groups of Parquet. So each belongs to
    exactly one of the ranges that make up a file.
    """

    number: int
    files: tuple[SourceFile, ...]
    begin: int
    end: int  # with several files: the sum of their bytes, with begin 0

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    def key(self) -> str:
        """16 hex digits that change with what the unit covers: paths, sizes, times of change, range."""
        state = [[file.path, file.bytes, file.mtime_ns] for file in self.files]
        return xxhash.xxh64(json.dumps([state, self.begin, self.end]).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Unit:
        return cls(**{**data, "files": tuple(SourceFile(**file) for file in data["files"])})


def find_files(
    inputs: Sequence[str], skipped_folders: Collection[str] = (), suffixes: Sequence[str] = SUFFIXES,
    without: Sequence[str] = (),
) -> Found:  # fmt: skip
    """The files that a user's inputs name, by name then path; counts of what was left out by reason; a fingerprint.

    An input is a file, a folder, a glob pattern or @LIST (a file with one of them per line, # for comments), local or
    s3://. A file named twice counts once, with its name in the shortest of the folders it was found in. What lies in
    the folders or below the URLs of `without` is left out, unless the input itself does. The fingerprint changes with
    any name, size or time of change.
    PrepareError: an input does not exist or matches nothing, a named file is of an unknown kind, nothing is found.
    """
    files: dict[str, tuple[int, str, SourceFile]] = {}
    left_out: Counter[str] = Counter()
    own = [_place(path) + "/" for path in without]
    for text in _without_lists(inputs):
        if not text.strip():
            raise PrepareError("--input is empty; name a file or a folder, as . for this one")
        root, infos = _below(text, skipped_folders)
        skipped = tuple(path for path in own if not f"{_place(root)}/".startswith(path))
        for info in infos:
            if (place := _place(info.path)).startswith(skipped):
                left_out["of the output"] += 1
                continue
            if not info.path.endswith(tuple(suffixes)):
                if info.path == root:
                    raise PrepareError(f"--input {text}: unknown kind of file; known: {' '.join(suffixes)}")
                left_out["unknown kind of file"] += 1
                continue
            name = (os.path.basename(root) + info.path.removeprefix(root)).lstrip("/")
            found = len(root), root, SourceFile(info.path, storage.printable(name), info.bytes, info.mtime_ns)
            files[place] = min(found, files.get(place, found), key=lambda item: (*item[:2], item[2].path))
    if not files:
        raise PrepareError(f"no {' '.join(suffixes)} file in {' '.join(inputs)}; name a folder that holds text")
    ordered = sorted((file for _, _, file in files.values()), key=lambda file: (file.name, file.path))
    return ordered, dict(left_out), _fingerprint([[file.name, file.bytes, file.mtime_ns] for file in ordered])


def _place(path: str) -> str:
    """The same text for all ways to name a file or folder."""
    return path.rstrip("/") if is_remote(path) else os.path.realpath(os.path.expanduser(path))


def default_corpus() -> Found:
    """Source and text files of the running Python's standard library: real, everywhere, nothing downloaded.

    Without times of change: the library of one Python version is the same wherever it was unpacked.
    """
    root = sysconfig.get_paths()["stdlib"]
    infos = [i for i in storage.list_files(root, DEFAULT_SKIPPED_FOLDERS) if i.path.endswith(DEFAULT_SUFFIXES)]
    files = [SourceFile(info.path, storage.printable(os.path.relpath(info.path, root)), info.bytes) for info in infos]
    files.sort(key=lambda file: file.name)
    return files, {}, _fingerprint([platform.python_version(), *([file.name, file.bytes] for file in files)])


def make_units(files: Sequence[SourceFile], unit_bytes: int = UNIT_BYTES, separator: str | None = None) -> list[Unit]:
    """All of the files, in order, in units of about `unit_bytes`; a function of the files and the two settings only.

    A larger file is cut into ranges where its kind allows it: JSON Lines, Parquet, and text that `separator` cuts
    into documents, none of them compressed. Other larger files are one unit each.
    """
    units: list[Unit] = []
    group: list[SourceFile] = []
    group_bytes = 0
    for file in files:
        cut = file.bytes > unit_bytes and file.compression is None and not file.is_one_document(separator)
        if group and (cut or len(group) == UNIT_FILES or group_bytes + file.bytes > unit_bytes):
            units.append(Unit(len(units), tuple(group), 0, group_bytes))
            group, group_bytes = [], 0
        if cut:
            for begin in range(0, file.bytes, unit_bytes):
                units.append(Unit(len(units), (file,), begin, min(begin + unit_bytes, file.bytes)))
        else:
            group.append(file)
            group_bytes += file.bytes
    if group:
        units.append(Unit(len(units), tuple(group), 0, group_bytes))
    return units


def _fingerprint(state: list[Any]) -> str:
    return xxhash.xxh64(json.dumps(state).encode()).hexdigest()


def _without_lists(inputs: Sequence[str]) -> Iterator[str]:
    """The inputs, with the lines of a list in its place."""
    for text in inputs:
        if not text.startswith("@"):
            yield text
            continue
        try:
            lines = storage.read_bytes(text[1:]).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise PrepareError(f"--input {text}: the list is not UTF-8; it holds one path per line") from error
        entries = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
        if not entries:
            raise PrepareError(f"--input {text}: the list is empty; write one path, URL or pattern per line")
        if nested := [entry for entry in entries if entry.startswith("@")]:
            raise PrepareError(f"--input {text}: {nested[0]} is a list inside a list; name it with --input")
        yield from entries


def _below(text: str, skipped_folders: Collection[str]) -> tuple[str, list[FileInfo]]:
    """What names are relative to (a folder or the file itself), and the files that one input stands for."""
    if not _is_pattern(text) or storage.exists(text):
        return storage.absolute(text), storage.list_files(text, skipped_folders)
    pattern = storage.absolute(text)
    parts = pattern.split("/")
    first = next(index for index, part in enumerate(parts) if _is_pattern(part))
    root = "/".join(parts[:first]) or "/"
    if is_remote(text):
        below = storage.list_files(root, skipped_folders) if storage.exists(root) else []
        infos = [info for info in below if _matches(info.path.split("/")[first:], parts[first:])]
    else:
        paths = sorted(glob.glob(pattern, recursive=True))
        infos = [info for path in paths for info in storage.list_files(path, skipped_folders)]
    if not infos:
        raise PrepareError(f"--input {text}: the pattern matches no file; check it (and quote it for the shell)")
    return root, infos


def _is_pattern(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the pattern is that of a path or of a folder above it, as `glob` takes patterns."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and _matches(parts[1:], pattern))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
