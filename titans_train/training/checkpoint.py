"""Checkpoints: one logical file set, whatever the layout that wrote it.

    <run>/checkpoints/step-00000010/   model.safetensors, exp_avg.safetensors, exp_avg_sq.safetensors (fp32, by name)
                                       carried-N.safetensors (rows from N of the batch, with training.carry_state)
                                       state.json: step, Adam's step, tokens, shape, config, data, sha256 of each file
    <run>/checkpoints/latest           the newest folder's name

Written beside as step-N.tmp, flushed, renamed when complete; then the pointer; then old ones are removed. Nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from titans_train.data import RecallDataset, TokenDataset
from titans_train.data.cursor import Cursor, check_goes_on, read_cursor, record
from titans_train.errors import UserError
from titans_train.models import LanguageModel
from titans_train.parallel import Engine, Mesh, agree, gather
from titans_train.parallel.engine import MOMENTS
from titans_train.plan import Plan
from titans_train.shape import ModelShape
from titans_train.training.carried import CarriedStates

FILES = {"parameters": "model.safetensors", **{key: f"{key}.safetensors" for key in MOMENTS}}


@dataclass(frozen=True)
class Progress:
    """What a run has done: optimiser steps, and where its data go on."""

    step: int
    cursor: Cursor

    @classmethod
    def start(cls, plan: Plan) -> Progress:
        return cls(0, Cursor.constant(plan.config.training.global_batch_size))

    @property
    def sequences(self) -> int:
        """Read so far."""
        return self.cursor.sequences(self.step)


def checkpoint_folder(run_directory: Path) -> Path:
    return run_directory / "checkpoints"


def save(
    engine: Engine,
    plan: Plan,
    progress: Progress,
    data: TokenDataset | RecallDataset,
    mesh: Mesh,
    carried: CarriedStates | None = None,
) -> Path:
    """Collective. Raises UserError on all ranks if the first rank cannot write; earlier checkpoints stay."""
    folder = checkpoint_folder(plan.run_directory)
    path = folder / f"step-{progress.step:08d}"
    temporary = path.with_name(path.name + ".tmp")
    agree(lambda: _begin(folder, temporary, plan.checkpoint_bytes), mesh, first_only=True)
    hashes = {}
    for kind, name in FILES.items():
        values = engine.parameters() if kind == "parameters" else engine.moments(kind)
        tensors = collect(values, mesh)  # every rank takes part in gathering; the first keeps
        hashes[name] = agree(partial(_write, temporary / name, tensors), mesh, first_only=True)
    if carried is not None:
        hashes |= dict(pair for pair in gather(agree(lambda: _write_carried(carried, temporary), mesh)) if pair)
    state = {
        "step": progress.step, "optimizer_step": engine.optimizer_step(),
        "tokens": progress.sequences * plan.config.training.sequence_length,
        "shape": plan.shape.to_dict(), "config": plan.config.model_dump(mode="json"),
        "data": record(progress.cursor, data.weights, data.fingerprints), "files": hashes,
    }  # fmt: skip
    agree(lambda: _finish(temporary, path, state, plan.config.checkpoint.keep), mesh, first_only=True)
    return path


def _write_carried(carried: CarriedStates, folder: Path) -> tuple[str, str] | None:
    name = carried.save(folder)
    return None if name is None else (name, _flushed(folder / name))


def collect(values: Iterable[tuple[str, Tensor]], mesh: Mesh) -> dict[str, Tensor]:
    tensors = {}
    for name, value in values:
        if mesh.is_first:
            tensors[name] = value.detach().float().cpu().contiguous().clone()
    return tensors


def check_disk(folder: Path, size: int) -> None:
    """UserError if a checkpoint of `size` bytes does not fit on the disk of `folder` (which need not exist yet)."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < 1.1 * size:
        raise UserError(
            f"a checkpoint needs {size / 2**20:,.0f} MiB and the disk of {place} has {free / 2**20:,.0f} MiB free; "
            "free some space, lower checkpoint.keep, or choose another run.folder"
        )


def _begin(folder: Path, temporary: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    check_disk(folder, size)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()


def _write(path: Path, tensors: dict[str, Tensor]) -> str:
    try:
        save_file(tensors, str(path))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise UserError(f"{path} could not be written ({error}); the earlier checkpoints are untouched") from error
    return _flushed(path)


def _flushed(path: Path) -> str:
    """Its sha256, once it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _sha256(path)


def _finish(temporary: Path, path: Path, state: dict[str, Any], keep: int) -> None:
    _write_text(temporary / "state.json", json.dumps(state, indent=1))
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)
    _write_text(path.parent / "latest.tmp", path.name)
    (path.parent / "latest.tmp").rename(path.parent / "latest")
    for old in sorted(path.parent.glob("step-????????"))[:-keep]:
        shutil.rmtree(old)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are all there with the right hashes. UserError names what is not."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name in {*FILES.values(), *state["files"]}:
            if _sha256(path / name) != state["files"][name]:
                raise UserError(f"{path / name} is damaged: its sha256 is not the one in state.json")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not a complete checkpoint: {error}") from error
    return dict(state)


def find_latest(run_directory: Path) -> Path | None:
    """The newest complete and undamaged checkpoint. Others are left where they are, and passed over with a line."""
    for path in sorted(checkpoint_folder(run_directory).glob("step-????????"), reverse=True):
        try:
            read_state(path)
            return path
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    return None


def load_model(path: Path) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a checkpoint, on the CPU in fp32 and in eval mode, and its state.json."""
    state = read_state(path)
    model = LanguageModel(ModelShape.from_dict(state["shape"]))
    model.load_state_dict(load_file(str(path / FILES["parameters"])))
    return model.eval(), state


def resume(
    engine: Engine,
    plan: Plan,
    data: TokenDataset | RecallDataset,
    mesh: Mesh,
    carried: CarriedStates | None = None,
) -> Progress:
    """Restores the newest checkpoint of the run on any layout; the start if there is none. Collective."""
    path = agree(lambda: find_latest(plan.run_directory), mesh, first_only=True)
    if path is None:
        return Progress.start(plan)
    state = json.loads((path / "state.json").read_text())
    agree(lambda: _check(path, state, plan, data), mesh)
    values = {kind: load_file(str(path / name)) for kind, name in FILES.items()}
    engine.load(values, int(state["optimizer_step"]))
    if carried is not None:
        carried.load(path, [name for name in state["files"] if name.startswith("carried-")])
    step = int(state["step"])
    return Progress(step, read_cursor(state["data"]).going_on(step, plan.config.training.global_batch_size))


def _check(path: Path, state: dict[str, Any], plan: Plan, data: TokenDataset | RecallDataset) -> None:
    if ModelShape.from_dict(state["shape"]) != plan.shape:
        theirs, ours = state["shape"], plan.shape.to_dict()
        differing = [f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in ours if theirs.get(k) != ours[k]]
        raise UserError(f"{path} is of another model ({'; '.join(differing)}); choose another run.name")
    if not isinstance(state["data"], dict):
        raise UserError(f"{path} is of an earlier version, which kept no cursor of its data; choose another run.name")
    check_goes_on(state["data"], data.weights, data.fingerprints, int(state["step"]), str(path))


def set_seed(seed: int) -> None:
    """The one seed, the same on every rank: initial weights do not depend on the layout."""
    torch.manual_seed(seed)
