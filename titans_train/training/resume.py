"""Going on from the newest checkpoint that is as it was written, on any layout."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.data.cursor import check_goes_on, read_cursor
from titans_train.errors import UserError
from titans_train.parallel import Engine, Mesh, agree, gather
from titans_train.plan import Plan
from titans_train.shape import completed
from titans_train.training.carried import CarriedStates
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.checkpoint_folder import candidates, has_set_aside, set_aside
from titans_train.training.checkpoint_writer import set_random_state
from titans_train.training.manifest import DamagedCheckpoint, check_hashes
from titans_train.training.progress import Progress


def resume(
    engine: Engine,
    plan: Plan,
    data: TokenDataset | SyntheticDataset,
    mesh: Mesh,
    carried: CarriedStates | None = None,
) -> Progress:
    """Restores the newest good checkpoint of the run; the start if there is none. Collective; so is a UserError."""
    found = newest(plan.run_directory, mesh)
    if found is None:
        return Progress.start(plan)
    manifest = found.manifest
    agree(lambda: _check(found, plan, engine, data), mesh)
    engine.restore(found.read, int(manifest["optimizer_step"]))
    if carried is not None:
        agree(lambda: _take_carried(carried, found), mesh)
    agree(lambda: set_random_state(manifest["random"]), mesh)
    cursor = read_cursor(manifest["data"]).going_on(found.step, plan.config.training.global_batch_size)
    return Progress(found.step, cursor, tuple(manifest["skipped"]))


def _take_carried(carried: CarriedStates, found: Checkpoint) -> None:
    if not found.carried and found.step > len(found.manifest["skipped"]):
        raise UserError(f"{found.path} has none of the states that rows carry; was it saved without carry_state?")
    try:
        carried.load(found.path, found.carried)
    except ValueError as error:
        raise UserError(str(error)) from error


def newest(run_directory: Path, mesh: Mesh) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; damaged ones are set aside. Collective."""
    for path in agree(lambda: candidates(run_directory), mesh, first_only=True):
        found, damage = agree(partial(_examined, path, mesh), mesh)
        first_damage = next((d for d in gather(damage) if d), None)
        if first_damage is None:
            return found  # type: ignore[no-any-return]
        agree(partial(_set_aside, path, first_damage), mesh, first_only=True)
    if agree(lambda: has_set_aside(run_directory), mesh, first_only=True):
        raise UserError(
            f"every checkpoint in {run_directory / 'checkpoints'} was damaged and is set aside there; restore one, or "
            "remove them (rm -r step-*.damaged*) to train from the beginning",
            agreed=True,
        )
    return None


def _examined(path: Path, mesh: Mesh) -> tuple[Checkpoint | None, str | None]:
    """This rank's share of the files; what is wrong, if anything is. OSError where a disk cannot be read at all."""
    try:
        found = Checkpoint.open(path, verify=False)
        if path.name != f"step-{found.step:08d}":
            raise DamagedCheckpoint(f"{path} holds step {found.step}: it is not where it was written")
        check_hashes(path, found.files, sorted(found.files)[mesh.rank :: mesh.world_size])
        return found, None
    except DamagedCheckpoint as error:
        return None, str(error)


def _set_aside(path: Path, damage: str) -> None:
    aside = set_aside(path)
    sys.stderr.write(f"set aside as {aside.name}: {damage}; the checkpoint before it is used\n")
    sys.stderr.flush()


def _check(found: Checkpoint, plan: Plan, engine: Engine, data: TokenDataset | SyntheticDataset) -> None:
    """UserError where this run's model or data are not the checkpoint's."""
    theirs: dict[str, Any] = completed(found.manifest["shape"])
    ours = json.loads(json.dumps(plan.shape.to_dict()))
    if theirs != ours:
        differing = [f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]
        raise UserError(f"{found.path} is of another model ({'; '.join(differing)}); choose another run.name")
    wanted = {name: shape for name, (shape, _) in engine.pieces.wholes().items()}
    stored = {name: found.shape_of(name) for name in found.names()}
    if wanted != stored:
        names = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
        first = f"{names[0]} {stored.get(names[0])} there, {wanted.get(names[0])} here"
        raise UserError(f"{found.path} has other parameters than this version's model, such as {first}")
    check_goes_on(found.manifest["data"], data.weights, data.fingerprints, found.step, str(found.path))
