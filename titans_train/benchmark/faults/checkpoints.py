"""Checkpoints that are damaged on the disk: set aside, and the one before is used."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from titans_train.benchmark.faults import damage
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import EVERY, FIRST
from titans_train.benchmark.faults.trial import Trial

_CARRIED = "sequence 2, carried state"
_NEWEST, _BEFORE = f"step-{2 * EVERY:08d}", f"step-{EVERY:08d}"
Spoil = Callable[[Path], None]
_NO_READERS = "data.workers=0"  # a start is quicker without
_NAMED = r"set aside|damaged|missing|not a complete"


def checkpoints(lab: Lab) -> Iterator[Trial]:
    """Every file of the newest checkpoint of a run that was killed, in every way; then it is started again."""
    for layout, name, way in _cases(lab):
        case = f"{layout}: {name} {way}"
        yield lab.attempt(case, partial(_of_a_file, lab, layout, case, name, way))
    if lab.quick:
        return
    case = f"{FIRST}: the newest checkpoint lost"
    yield lab.attempt(
        case, partial(_trial, lab, FIRST, case, lambda folder: shutil.rmtree(folder / _NEWEST), named=False)
    )
    for way in ("a bit of its middle flipped", "emptied", "lost"):
        case = f"{FIRST}: latest {way}"
        yield lab.attempt(case, partial(_trial, lab, FIRST, case, partial(_alone, way, "latest"), named=False))
    case = f"{FIRST}: every checkpoint damaged, one put back from a copy"
    yield lab.attempt(case, partial(_all_damaged, lab, case))


def _cases(lab: Lab) -> Iterator[tuple[str, str, str]]:
    """(layout, file, way)."""
    if lab.quick:
        yield FIRST, "rank-00001.safetensors", "a bit of its middle flipped"
        return
    for layout in (FIRST, _CARRIED):
        files = _files(lab, layout)
        for name in files if layout == FIRST else [name for name in files if name.startswith("carried")][:1]:
            for way in _ways(name, files):
                yield layout, name, way


def _files(lab: Lab, layout: str) -> list[str]:
    return sorted(path.name for path in (lab.base(layout) / "checkpoints" / _NEWEST).iterdir())


def _of_a_file(lab: Lab, layout: str, case: str, name: str, way: str) -> Trial:
    return _trial(lab, layout, case, _ways(name, _files(lab, layout))[way])


def _ways(name: str, files: list[str]) -> dict[str, Spoil]:
    """What can happen to a file of the newest checkpoint: each is given the folder of checkpoints."""
    file = f"{_NEWEST}/{name}"
    ways: dict[str, Spoil] = {way: partial(_alone, way, file) for way in damage.ALONE if way != damage.EVERY_BYTE}
    ways["replaced by the earlier checkpoint's"] = partial(_replaced, name)
    for other in files:
        if name < other and Path(name).suffix == Path(other).suffix:
            ways[f"swapped with {other}"] = partial(_swapped, file, f"{_NEWEST}/{other}")
    return ways


def _alone(way: str, file: str, folder: Path) -> None:
    damage.ALONE[way](folder / file)


def _replaced(name: str, folder: Path) -> None:
    shutil.copyfile(folder / _BEFORE / name, folder / _NEWEST / name)


def _swapped(file: str, other: str, folder: Path) -> None:
    damage.swap(folder / file, folder / other)


def _trial(lab: Lab, layout: str, case: str, spoil: Spoil, named: bool = True) -> Trial:
    trial = lab.new_run("checkpoint", layout, _NO_READERS, start=lab.base(layout))
    spoil(trial.folder / "checkpoints")
    since = time.monotonic()
    job = lab.start(trial)
    job.wait_for(lambda: job.says(_NAMED) if named else job.resumed_from() is not None)
    seconds = time.monotonic() - since if named else None
    return lab.outcome(trial, case, since, seconds=seconds, found=_NAMED if named else None)


def _all_damaged(lab: Lab, case: str) -> Trial:
    """The run is not begun anew over what may still be saved; it goes on when a copy of one was put back."""
    trial = lab.new_run("checkpoint", FIRST, _NO_READERS, start=lab.base())
    folder = trial.folder / "checkpoints"
    for step in (_NEWEST, _BEFORE):
        damage.flip(folder / step / "rank-00000.safetensors")
    since = time.monotonic()
    lab.start(trial)

    def put_back() -> None:
        shutil.copytree(lab.base() / "checkpoints" / _NEWEST, folder / _NEWEST)

    return lab.outcome(trial, case, since, statuses=[2], found="every checkpoint", mend=put_back)
