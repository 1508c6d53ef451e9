"""The working folder: what a run has done so far, so that the next one goes on from there.

settings.json  what it is the work of      units/  intermediates (see units.py)
shards/  a record of each shard that is written or uploaded      output/  what becomes the prepared folder
input.json  files of the input      shared_memory.json  what a killed run has left there
claim.json  see claim.py            tokenizer.json or tokenizer.model  the copy that is worked with
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.addresses import is_remote
from data_prep.claim import is_others, release
from data_prep.durable import TEMPORARY, read_json, write_json
from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME
from data_prep.shards import ShardRecord
from data_prep.sources import SourceFile
from data_prep.storage import delete, exists, join
from data_prep.tokenizer import TOKENIZER_FILES, Tokenizer, from_spec

_SETTINGS = "settings.json"
_INPUT = "input.json"
_SHARED_MEMORY = "shared_memory.json"
_SHOWN_FILES = 3


@dataclass(frozen=True)
class Place:
    """Where a run writes. `output` is an absolute local path or a URL, without a slash at its end."""

    output: str
    work: Path
    named: bool  # `work` was named by the user, and may be on another disk than the output

    @property
    def remote(self) -> str | None:
        return self.output if is_remote(self.output) else None

    @property
    def local(self) -> Path:
        assert self.remote is None
        return Path(self.output)

    @property
    def beside(self) -> Path:
        """A folder on the output's disk: what is renamed has to be there."""
        return self.work if self.remote else _partial(self.local.parent, self.local.name)

    @property
    def staging(self) -> Path:
        return self.beside / "output"

    @property
    def units(self) -> Path:
        return self.work / "units"

    @property
    def records(self) -> Path:
        return self.work / "shards"

    def locks(self) -> list[Path]:
        """One for each folder that two runs could meet in."""
        of_work = self.work.parent / f".{self.work.name}.lock"
        if self.remote:
            return [of_work]
        return [self.local.parent / f".{self.local.name}.lock", *([of_work] if self.named else [])]


def find_place(output: str, work: str | None) -> Place:
    """From what --output and --work say. An output that is a link is what it points to, also when that is not there."""
    if not output.strip():
        raise PrepareError("--output is empty; name a folder or s3://BUCKET/KEY")
    output = output.rstrip("/") if is_remote(output) else str(Path(output).expanduser().absolute())
    if not is_remote(output) and Path(output).is_symlink():
        output = os.path.realpath(output)
    folder = Path.cwd() if is_remote(output) else Path(output).parent
    default = _partial(folder, output.rpartition("/")[2])
    return Place(output, Path(work).expanduser().absolute() if work else default, work is not None)


def _partial(parent: Path, name: str) -> Path:
    return parent / f".{name}.partial"


@contextmanager
def locked(place: Place) -> Iterator[None]:
    """PrepareError when another process prepares the same output or uses the same working folder."""
    with ExitStack() as stack:
        for path in place.locks():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=0)
            try:
                stack.enter_context(lock)
            except Timeout as error:
                raise PrepareError(
                    f"another process is preparing {place.output} (it holds {path}); wait for it or name another "
                    "--output"
                ) from error
            stack.callback(path.unlink, missing_ok=True)  # runs first, while the lock is held
        yield


def open_work(place: Place, wanted: dict[str, Any], files: Sequence[SourceFile], tool: str, restart: bool) -> bool:
    """Make the working folder, or find it. True when it holds work of the same run, to be gone on with.

    PrepareError when it holds the work of other settings, and where a folder named by the user holds anything else.
    Where nothing is finished yet, other settings begin anew.
    """
    _remove_shared_memory(place.work)
    if restart:
        discard(_place_of_work(place))
    mine = {"output": place.output, "tool": tool, **wanted}
    found = read_json(place.work / _SETTINGS)
    if found == mine:
        _remove_temporary(place)
        return True
    if found is not None and _is_begun(place):
        differing = "; ".join(
            f"{key} {found.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(found.keys() | mine.keys())
            if found.get(key) != mine.get(key)
        )
        raise PrepareError(
            f"{place.work} holds unfinished work of other settings or another input ({differing}"
            f"{_changes(place, files)}); give the same ones to go on with it, or --restart to throw it away"
        )
    if found is not None:
        discard(_place_of_work(place))
    if place.named and place.work.is_dir() and any(place.work.iterdir()):
        raise PrepareError(f"--work {place.work} holds something else; name an empty folder, or one that is not there")
    for folder in {place.work, place.beside}:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (place.units, place.records, place.staging):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(place.work / _INPUT, _states(files))
    write_json(place.work / _SETTINGS, mine)
    return False


def _place_of_work(place: Place) -> Place:
    """With the output that the work in the folder is for, which may be another one."""
    found = read_json(place.work / _SETTINGS)
    return replace(place, output=str(found["output"])) if isinstance(found, dict) and "output" in found else place


def _is_begun(place: Place) -> bool:
    """Whether a unit or a shard is finished."""
    return any(next(folder.rglob("*.json"), None) for folder in (place.units, place.records))


def _states(files: Sequence[SourceFile]) -> dict[str, list[int]]:
    return {file.path: [file.bytes, file.mtime_ns] for file in files}


def _changes(place: Place, files: Sequence[SourceFile]) -> str:
    """The first files that changed since the work began, as a part of a sentence; nothing where none did."""
    before, now = read_json(place.work / _INPUT), _states(files)
    if not isinstance(before, dict) or before == now:
        return ""
    found = [
        f"{path} {'changed' if path in before and path in now else 'appeared' if path in now else 'vanished'}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]
    more = f" and {len(found) - _SHOWN_FILES:,} more" if len(found) > _SHOWN_FILES else ""
    return f": {', '.join(found[:_SHOWN_FILES])}{more}"


def is_work_of(place: Place, wanted: dict[str, Any]) -> bool:
    found = read_json(place.work / _SETTINGS)
    return isinstance(found, dict) and found.items() >= wanted.items()


def discard(place: Place) -> None:
    """Remove the working folder, and with it what an unfinished run uploaded."""
    if read_json(place.work / _SETTINGS) is None and place.named:
        return
    if place.remote and not (is_others(place.remote, place.work) or exists(join(place.remote, FILE_NAME))):
        records = [read_json(path) for path in sorted(place.records.rglob("*.json"))]
        names = [ShardRecord(**record).path for record in records if isinstance(record, dict)]
        names += [path.relative_to(place.staging).as_posix() for path in place.staging.rglob("*") if path.is_file()]
        for name in names:
            delete(join(place.remote, name))
    remove_work(place)


def remove_work(place: Place) -> None:
    release(place.work)
    shutil.rmtree(place.work, ignore_errors=True)
    shutil.rmtree(place.beside, ignore_errors=True)


def _remove_temporary(place: Place) -> None:
    """What a killed run was writing."""
    shutil.rmtree(place.beside / "writing", ignore_errors=True)
    for path in place.work.rglob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    for folder in (place.units, place.records, place.staging):
        folder.mkdir(parents=True, exist_ok=True)


def kept_tokenizer(place: Place, tokenizer: Tokenizer) -> Path | None:
    """Where the copy of a tokenizer's file lies; None where it has no file."""
    return None if tokenizer.path is None else place.work / TOKENIZER_FILES[tokenizer.kind]


def keep_tokenizer(place: Place, tokenizer: Tokenizer) -> dict[str, Any]:
    """Copy its file, so that nothing that is done to it matters any more. The spec of the copy."""
    spec, copy = tokenizer.spec(), kept_tokenizer(place, tokenizer)
    if copy is None:
        return spec
    shutil.copyfile(str(tokenizer.path), copy)
    spec = {**spec, "path": str(copy)}
    if from_spec(spec).sha256 != tokenizer.sha256:
        raise PrepareError(f"tokenizer {tokenizer.path} has changed since the run began; run again")
    return spec


def note_shared_memory(work: Path) -> None:
    """Write down what this process has in /dev/shm, for the next run to remove should all processes be killed."""
    (work / _SHARED_MEMORY).write_text(_shared_memory().listing(), "utf-8")


def _remove_shared_memory(work: Path) -> None:
    note = work / _SHARED_MEMORY
    if note.is_file():
        _shared_memory().remove(note.read_text("utf-8"))
        note.unlink()


def _shared_memory() -> Any:
    """titans_train.data.shared_memory, without its package, which takes seconds to import."""
    found = importlib.util.find_spec("titans_train")
    assert found is not None and found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "data" / "shared_memory.py"
    spec = importlib.util.spec_from_file_location("data_prep._shared_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
