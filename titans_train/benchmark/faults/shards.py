"""Data shards that are damaged: no token of one is trained on. What the model is given is compared, batch by batch."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from titans_train.benchmark.faults import damage
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import EVERY, FIRST, Reference
from titans_train.benchmark.faults.trial import Trial

_NAMED = r"shard\.\d+\.mds"
_WAYS = ("a bit of its middle flipped", "cut to half", "lost")


def shards(lab: Lab) -> Iterator[Trial]:
    """Shards as they were prepared, their copies in the run's cache, and shards that are read where they lie."""
    for way in _WAYS[:1] if lab.quick else (*_WAYS, "swapped"):
        yield _prepared(lab, way)
    if lab.quick:
        return
    for way in (*_WAYS, "swapped"):
        yield _cached(lab, way, running=False)
    for way in (*_WAYS, "swapped"):
        yield _cached(lab, way, running=True)
    for way in (*_WAYS, "swapped"):
        yield _in_place(lab, way)


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


def _prepared(lab: Lab, way: str) -> Trial:
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
    case = f"two prepared shards {way} before the start, put back after the run has ended"
    result = lab.outcome(trial, case, since, statuses=[2], found=_NAMED, mend=backup.restore, watch=True)
    shutil.rmtree(folder)
    return result


def _cached(lab: Lab, way: str, running: bool) -> Trial:
    """Every decompressed shard that the run has used. It has to make them anew, while it runs if need be."""
    trial = lab.new_run("shard", start=lab.base())
    cached = sorted((trial.folder / "cache").rglob("train/**/shard.*.mds"))
    if not running:
        _spoil(way, cached)
    job = lab.start(trial, {})
    if running:
        job.wait_logged(trial.folder, 2 * EVERY + 2)
        _spoil(way, cached)
    when = "while it runs" if running else "before it goes on"
    case = f"{len(cached)} shards in the cache of a run {way} {when}"
    return lab.outcome(trial, case, time.monotonic(), seconds=None, statuses=[0], watch=True)


def _in_place(lab: Lab, way: str) -> Trial:
    """Shards without compression are read where they lie: all are damaged under a run, which has to end."""
    folder = lab.prepared("none")
    reference = lab.reference(FIRST, f"data.path={folder}")
    paths = sorted(folder.rglob("train/**/shard.*.mds"))
    trial = lab.new_run("shard", FIRST, f"data.path={folder}")
    job = lab.start(trial, {})
    job.wait_logged(trial.folder, EVERY + 1)
    backup = damage.Backup(lab.folder / f"backup-{trial.name}", *paths)
    _spoil(way, paths)
    case = f"{len(paths)} shards that are read in place {way} while the run reads them"
    return lab.outcome(
        trial, case, time.monotonic(), found=_NAMED, statuses=[2], mend=backup.restore, watch=True, reference=reference
    )
