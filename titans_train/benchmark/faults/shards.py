"""Data shards that are damaged: no token of one is trained on. What the model is given is compared, batch by batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from titans_train.benchmark.faults import damage
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import EVERY, FIRST, Reference
from titans_train.benchmark.faults.trial import Trial

_NAMED = r"shard\.\d+\.mds"
_WAYS = ("a bit of its middle flipped", damage.EVERY_BYTE, "cut to half", "lost", "swapped")


def shards(lab: Lab) -> Iterator[Trial]:
    """Shards as they were prepared, their copies in the run's cache, and shards that are read where they lie."""
    for way in _WAYS[:1] if lab.quick else _WAYS:
        case = f"two prepared shards, {way}, before the start; put back after the run has ended"
        yield lab.attempt(case, partial(_prepared, lab, case, way))
    for way in [damage.EVERY_BYTE] if lab.quick else _WAYS:
        case = f"the shards in the cache of a run, {way}, before it goes on"
        yield lab.attempt(case, partial(_cached, lab, case, way, running=False))
    if lab.quick:
        return
    for way in _WAYS:
        case = f"the shards in the cache of a run, {way}, while it runs"
        yield lab.attempt(case, partial(_cached, lab, case, way, running=True))
    for way in _WAYS:
        case = f"the shards that are read in place, {way}, while the run reads them"
        yield lab.attempt(case, partial(_in_place, lab, case, way))


def _spoil(way: str, paths: list[Path]) -> None:
    """Each of the files; "swapped": each gets the content of the next."""
    if way == "swapped":
        contents = [path.read_bytes() for path in paths]
        for path, content in zip(paths, contents[1:] + contents[:1], strict=True):
            path.write_bytes(content)
        return
    for path in paths:
        damage.ALONE[way](path)


def _used_last(reference: Reference, count: int = 2) -> list[str]:
    """Names of the shards that the uninterrupted run needed last."""
    cached = (reference.run / "cache").rglob("train/**/shard.*.mds")
    return [path.name for path in sorted(cached, key=lambda path: path.stat().st_mtime_ns)][-count:]


def _prepared(lab: Lab, case: str, way: str) -> Trial:
    """Before the run begins. It has to end when it comes to the shard; the user puts the shard back."""
    reference = lab.reference()
    folder = lab.folder / f"copy-{len(list(lab.folder.glob('copy-*')))}"
    shutil.copytree(lab.prepared(), folder)
    names = _used_last(reference)
    paths = [next(folder.rglob(f"train/**/{name}.zstd")) for name in names]
    backup = damage.Backup(folder / "backup", *paths)
    _spoil(way, paths)
    trial = lab.new_run("shard", FIRST, f"data.path={folder}")
    since = time.monotonic()
    lab.start(trial, {})
    result = lab.outcome(trial, case, since, statuses=[2], found=_NAMED, mend=backup.restore, watch=True)
    shutil.rmtree(folder)
    return result


def _cached(lab: Lab, case: str, way: str, running: bool) -> Trial:
    """Every decompressed shard that the run has used. It has to make those anew that it comes to again.

    While it runs, it may have no more need of any, so then only what the model is given counts.
    """
    trial = lab.new_run("shard", start=lab.base())
    cached = sorted((trial.folder / "cache").rglob("train/**/shard.*.mds"))
    whole = [path.read_bytes() for path in cached]
    if not running:
        _spoil(way, cached)
    job = lab.start(trial, {})
    if running:
        job.wait_logged(trial.folder, 2 * EVERY + 2)
        _spoil(way, cached)
    since = time.monotonic()
    job.wait_end()
    again = sum(path.exists() and path.read_bytes() == content for path, content in zip(cached, whole, strict=True))
    case += f": {again} of {len(cached)} made anew"
    broken = "" if again or running else "no damaged shard was made anew"
    return lab.outcome(trial, case, since, seconds=None, statuses=[0], watch=True, broken=broken)


def _in_place(lab: Lab, case: str, way: str) -> Trial:
    """Shards without compression are read where they lie: all are damaged under a run, which has to end."""
    folder = lab.prepared("none")
    reference = lab.reference(FIRST, f"data.path={folder}")
    paths = sorted(folder.rglob("train/**/shard.*.mds"))
    trial = lab.new_run("shard", FIRST, f"data.path={folder}")
    job = lab.start(trial, {})
    job.wait_logged(trial.folder, EVERY + 1)
    backup = damage.Backup(lab.folder / f"backup-{trial.name}", *paths)
    _spoil(way, paths)
    return lab.outcome(
        trial, case, time.monotonic(), found=_NAMED, statuses=[2], mend=backup.restore, watch=True, reference=reference
    )
