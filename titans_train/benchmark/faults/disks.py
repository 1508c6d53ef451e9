"""Disks that are full or cannot be written to when a checkpoint is saved: small ones in memory, mounted for it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from titans_train.benchmark.faults.lab import Lab, Unavailable
from titans_train.benchmark.faults.run import EVERY, FIRST, TrialRun
from titans_train.benchmark.faults.trial import Trial

_MEGABYTES = 64
_NAMED = r"(?i)could not be written|was not written|no space|read-only"


class Disk:
    """A file system in memory at `place`."""

    def __init__(self, place: Path) -> None:
        self.place, self._filler = place, place / "filler"

    def fill(self) -> None:
        """To the last byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def fill_names(self, left: int) -> None:
        """Until it has room for `left` more files and folders, but for as many bytes as before."""
        self._filler.mkdir()
        for number in range(os.statvfs(self.place).f_favail - left):
            (self._filler / f"{number}").touch()

    def free(self) -> None:
        if self._filler.is_dir():
            shutil.rmtree(self._filler)
        self._filler.unlink(missing_ok=True)

    def forbid(self) -> None:
        _mount("-o", "remount,ro", str(self.place))

    def allow(self) -> None:
        _mount("-o", "remount,rw", str(self.place))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"mounting is not possible here ({done.stderr.strip()})")


@contextmanager
def mounted(place: Path, names: int = 4096) -> Iterator[Disk]:
    """A disk with what is in the folder `place` now, in its place, and room for so many files and folders."""
    content = place.with_name(f"{place.name}.content")
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(place, content)
    _mount("-t", "tmpfs", "-o", f"size={_MEGABYTES}m,nr_inodes={names}", "tmpfs", str(place))
    try:
        shutil.copytree(content, place, dirs_exist_ok=True)
        yield Disk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], capture_output=True)
        shutil.rmtree(content, ignore_errors=True)


def disks(lab: Lab) -> Iterator[Trial]:
    """Before the third save of a run; put right as soon as it is named, or when the job has ended."""
    spoils: list[tuple[str, Callable[[Disk], None], Callable[[Disk], None], bool]] = [
        ("is full until that is named", Disk.fill, Disk.free, True),
        ("is full until the run ends", Disk.fill, Disk.free, False),
        ("is read-only until that is named", Disk.forbid, Disk.allow, True),
        ("is read-only until the run ends", Disk.forbid, Disk.allow, False),
    ]
    for left in range(1, 5):
        text = f"has room for {left} more files and folders until the run ends"
        spoils.append((text, partial(Disk.fill_names, left=left), Disk.free, False))
    spoils.append(("is filled while the save is under way", _fill_in_the_middle, Disk.free, False))
    for text, spoil, mend, at_once in spoils[: 1 if lab.quick else None]:
        case = f"{FIRST}: the disk of checkpoints {text}"
        yield lab.attempt(case, partial(_trial, lab, case, spoil, mend, at_once))
    if not lab.quick:
        case = f"{FIRST}: the disk of the whole run folder is full"
        yield lab.attempt(case, partial(_whole_run, lab, case))


def _trial(lab: Lab, case: str, spoil: Callable[[Disk], None], mend: Callable[[Disk], None], at_once: bool) -> Trial:
    trial = lab.new_run("disk", FIRST, "data.workers=0", start=lab.base())
    with mounted(trial.folder / "checkpoints") as disk:
        return _spoiled(lab, trial, disk, case, spoil, mend, at_once)


def _whole_run(lab: Lab, case: str) -> Trial:
    """Metrics and all else cannot be written either."""
    trial = lab.new_run("disk", FIRST, "data.workers=0", start=lab.base())
    with mounted(trial.folder) as disk:
        return _spoiled(lab, trial, disk, case, Disk.fill, Disk.free, False)


def _spoiled(
    lab: Lab,
    trial: TrialRun,
    disk: Disk,
    case: str,
    spoil: Callable[[Disk], None],
    mend: Callable[[Disk], None],
    at_once: bool,
) -> Trial:
    job = lab.start(trial)
    job.wait_for(lambda: job.resumed_from() is not None)
    spoil(disk)
    since = time.monotonic()
    job.wait_for(lambda: job.says(_NAMED))
    seconds = time.monotonic() - since
    if at_once:
        mend(disk)
    else:
        job.wait_end()
        mend(disk)
    return lab.outcome(trial, case, since, seconds=seconds, found=_NAMED)


def _fill_in_the_middle(disk: Disk) -> None:
    """When the folder that is written into appears."""
    deadline = time.monotonic() + 30
    while not list(disk.place.glob(f"*{3 * EVERY:08d}*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    disk.fill()
