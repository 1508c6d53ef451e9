"""The folder of a run's checkpoints: what is in it, what fits, what stays, what is set aside. For one rank to call."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_prep.durable import flush_directory, whole_file
from titans_train.config.schema import Checkpoint as Settings
from titans_train.errors import UserError
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.manifest import DamagedCheckpoint, read_manifest

LATEST, TEMPORARY, DAMAGED, REMOVED = "latest", ".tmp", ".damaged", ".removed"
_TRIES = 3


def checkpoint_folder(run_directory: Path) -> Path:
    return run_directory / "checkpoints"


def checkpoint_path(run_directory: Path, step: int) -> Path:
    return checkpoint_folder(run_directory) / f"step-{step:08d}"


def temporary_path(run_directory: Path, step: int) -> Path:
    """Where a checkpoint is written before it is one."""
    path = checkpoint_path(run_directory, step)
    return path.with_name(path.name + TEMPORARY)


def candidates(run_directory: Path) -> list[Path]:
    """What is called a checkpoint, newest first. Checkpoints that are being written or were set aside are not."""
    found = checkpoint_folder(run_directory).glob("step-*")
    return sorted((p for p in found if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that nothing takes it for a good one; its new path. OSError if that fails."""
    for number in range(1, 10_000):
        aside = path.with_name(f"{path.name}{DAMAGED}{'' if number == 1 else f'-{number}'}")
        if not aside.exists():
            return path.rename(aside)
    raise OSError(f"there are too many {path.name}{DAMAGED}-N")


def has_set_aside(run_directory: Path) -> bool:
    return any(checkpoint_folder(run_directory).glob(f"step-*{DAMAGED}*"))


def find_latest(run_directory: Path) -> Path | None:
    """The newest checkpoint that is complete and undamaged. Changes nothing; for readers beside the training."""
    for _ in range(_TRIES):
        gone = False
        for path in candidates(run_directory):
            try:
                Checkpoint.open(path)
                return path
            except DamagedCheckpoint:
                gone = gone or not path.exists()
        if not gone:  # else a training has removed what was being read, and has newer ones
            break
    return None


def check_disk(folder: Path, size: int) -> None:
    """UserError if a checkpoint of `size` bytes does not fit on the disk of `folder` (which need not exist yet)."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < 1.1 * size:
        raise UserError(
            f"a checkpoint needs {size / 2**20:,.0f} MiB and the disk of {place} has {free / 2**20:,.0f} MiB free; "
            "free some space, lower checkpoint.keep, or choose another run.folder"
        )


def begin(run_directory: Path, step: int, size: int) -> Path:
    """An empty folder to write a checkpoint into, on a disk that has room for it."""
    temporary = temporary_path(run_directory, step)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(run_directory)
    if temporary.exists():
        shutil.rmtree(temporary)
    check_disk(temporary.parent, size)
    temporary.mkdir()
    return temporary


def clear_leftovers(run_directory: Path) -> None:
    """Removes what a killed save or removal has left, where it can. Only while no save is under way."""
    folder = checkpoint_folder(run_directory)
    for pattern in (f"step-*{TEMPORARY}", f"step-*{REMOVED}"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"{LATEST}.*"):
        path.unlink(missing_ok=True)


def publish(temporary: Path) -> None:
    """Makes a folder that is complete and flushed a checkpoint, which a power cut does not undo."""
    path = temporary.with_name(temporary.name.removesuffix(TEMPORARY))
    if path.exists():  # of a run that went back to an earlier step
        _remove(path)
    temporary.rename(path)
    flush_directory(path.parent)


def point_at(path: Path) -> None:
    """Moves the pointer for readers outside."""
    with whole_file(path.with_name(LATEST)) as pointer:
        pointer.write(path.name.encode())
    flush_directory(path.parent)


def prune(run_directory: Path, settings: Settings) -> None:
    """Removes all but the last `keep`, those of every `keep_every`-th step, and the `keep_best` best."""
    paths = candidates(run_directory)
    kept = set(paths[: settings.keep])
    if settings.keep_every:
        kept |= {p for p in paths if int(p.name[5:]) % settings.keep_every == 0}
    if settings.keep_best:
        losses = {p: loss for p in paths if (loss := _validation_loss(p)) is not None}
        kept |= set(sorted(losses, key=lambda p: losses[p])[: settings.keep_best])
    for path in paths:
        if path not in kept:
            _remove(path)


def _validation_loss(path: Path) -> float | None:
    """OSError where it cannot be read now: then nothing is to be removed."""
    try:
        return read_manifest(path)["validation_loss"]  # type: ignore[no-any-return]
    except DamagedCheckpoint:
        return None


def _remove(path: Path) -> None:
    """A removal that is killed half-way leaves nothing that is called a checkpoint."""
    aside = path.with_name(path.name + REMOVED)
    if aside.exists():
        shutil.rmtree(aside)
    shutil.rmtree(path.rename(aside))
