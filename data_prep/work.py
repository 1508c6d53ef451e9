"""The working folder: what a run has done so far, so that the next one goes on from there.

settings.json  what it is the work of      units/  intermediates (see units.py)
shards/  a record of each shard that is written or uploaded      output/  what becomes the prepared folder
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.durable import TEMPORARY, read_json, write_json
from data_prep.errors import PrepareError
from data_prep.shards import ShardRecord
from data_prep.storage import delete, is_remote, join

_SETTINGS = "settings.json"


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
    """From what --output and --work say."""
    output = output.rstrip("/") if is_remote(output) else str(Path(output).expanduser().absolute())
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


def open_work(place: Place, wanted: dict[str, Any], tool: str, restart: bool) -> bool:
    """Make the working folder, or find it. True when it holds work of the same run, to be gone on with.

    PrepareError when it holds the work of other settings, and where a folder named by the user holds anything else.
    """
    if restart:
        discard(place)
    mine = {"output": place.output, "tool": tool, **wanted}
    found = read_json(place.work / _SETTINGS)
    if found == mine:
        _remove_temporary(place)
        return True
    if found is not None:
        differing = "; ".join(
            f"{key} {found.get(key)!r}, now {mine.get(key)!r}"
            for key in sorted(found.keys() | mine.keys())
            if found.get(key) != mine.get(key)
        )
        raise PrepareError(
            f"{place.work} holds unfinished work of other settings or another input ({differing}); give the same ones "
            "to go on with it, or --restart to throw it away"
        )
    if place.named and place.work.is_dir() and any(place.work.iterdir()):
        raise PrepareError(f"--work {place.work} holds something else; name an empty folder, or one that is not there")
    for folder in {place.work, place.beside}:
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (place.units, place.records, place.staging):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(place.work / _SETTINGS, mine)
    return False


def is_work_of(place: Place, wanted: dict[str, Any]) -> bool:
    found = read_json(place.work / _SETTINGS)
    return isinstance(found, dict) and found.items() >= wanted.items()


def discard(place: Place) -> None:
    """Remove the working folder, and with it what an unfinished run uploaded."""
    if read_json(place.work / _SETTINGS) is None and place.named:
        return
    if place.remote:
        records = [read_json(path) for path in sorted(place.records.rglob("*.json"))]
        names = [ShardRecord(**record).path for record in records if isinstance(record, dict)]
        names += [path.relative_to(place.staging).as_posix() for path in place.staging.rglob("*") if path.is_file()]
        for name in names:
            delete(join(place.remote, name))
    remove_work(place)


def remove_work(place: Place) -> None:
    shutil.rmtree(place.work, ignore_errors=True)
    shutil.rmtree(place.beside, ignore_errors=True)


def _remove_temporary(place: Place) -> None:
    """What a killed run was writing."""
    shutil.rmtree(place.beside / "writing", ignore_errors=True)
    for path in place.work.rglob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
    for folder in (place.units, place.records, place.staging):
        folder.mkdir(parents=True, exist_ok=True)
