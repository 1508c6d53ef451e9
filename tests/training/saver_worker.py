"""Run under torchrun on 2 ranks by test_checkpoint.py: saves that work, that fail, and what training does meanwhile.

Usage: saver_worker.py FOLDER PREPARED. A rank "has a full disk" when its files may not grow (RLIMIT_FSIZE).
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.training.worker import plan_of
from titans_train.data import open_dataset
from titans_train.errors import UserError
from titans_train.parallel import process_group
from titans_train.training import run_folder
from titans_train.training.checkpoint_saver import Saver
from titans_train.training.decisions import decide
from titans_train.training.loop import build_engine
from titans_train.training.manifest import read_manifest, write_manifest
from titans_train.training.progress import Progress
from titans_train.training.resume import newest, resume


@contextmanager
def full_disk(here: bool) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if here:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def flip(path: Path) -> None:
    """One bit, in the part of the rank that is not the first."""
    content = bytearray((path / "rank-00001.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "rank-00001.safetensors").write_bytes(content)


def cut(path: Path) -> None:
    with (path / "rank-00000.safetensors").open("r+b") as file:
        file.truncate(1000)


def swap(path: Path) -> None:
    first, second, aside = path / "rank-00000.safetensors", path / "rank-00001.safetensors", path / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def main(folder: Path, prepared: Path) -> None:
    with process_group() as mesh:
        checkpoint = {"keep": 2, "keep_every": 4, "keep_best": 1, "every": 100}
        plan = plan_of(folder, prepared, "run", 1, 2, checkpoint=checkpoint)
        data = open_dataset(plan.config, "train", plan.shape.document_alignment)
        engine, said = build_engine(plan, mesh), []
        plan.run_directory.mkdir(parents=True, exist_ok=True)
        saver = Saver(engine, plan, data, mesh, None, said.append)
        start = Progress.start(plan)
        found: dict[str, Any] = {}

        def save(step: int, loss: float | None = None) -> None:
            saver.save(Progress(step, start.cursor), loss)

        save(1, 2.0)
        steps = 0
        while saver.saved_step < 1:  # what the loop does once per step
            saver.follow(decide(saver.wishes()))
            steps += 1
        found["steps until published"] = steps
        for victim in range(2):  # a failing rank, then a failing first rank; the run goes on
            with full_disk(mesh.rank == victim):
                save(2 + victim)
                try:
                    saver.finish()
                except UserError as error:
                    found[f"failed on {victim}"] = [str(error), saver.saved_step]
        for step, loss in ((4, 1.0), (5, 3.0), (6, math.nan), (7, 2.5)):
            save(step, loss)  # waits for the one before
        saver.finish()
        found["saved"] = saver.saved_step
        found["said"] = said
        if mesh.is_first:
            run_folder.write(plan)
            shutil.copytree(plan.run_directory, folder / "kept")
        found["newest"] = []
        for damage in (flip, cut, swap):  # one after the other, each to what is the newest then
            if mesh.is_first:
                damage(plan.run_directory / "checkpoints" / f"step-{(7, 6, 4)[len(found['newest'])]:08d}")
            try:
                newest_one = newest(plan.run_directory, mesh)
                found["newest"].append(None if newest_one is None else newest_one.step)
            except UserError as error:
                found["newest"].append(str(error))
        if mesh.is_first:  # the same elements in another shape, and a manifest that agrees with itself
            good = plan.run_directory / "checkpoints" / "step-00000007"
            shutil.copytree(folder / "kept" / "checkpoints" / good.name, good)
            manifest = read_manifest(good)
            shape = manifest["tensors"]["embedding.weight"]["shape"]
            manifest["tensors"]["embedding.weight"]["shape"] = [math.prod(shape)]
            write_manifest(good, manifest)
        before = [value.clone() for value in engine.model.parameters()]
        try:
            resume(engine, plan, data, mesh)
        except UserError as error:
            found["reshaped"] = str(error)
        found["untouched"] = all(torch.equal(a, b) for a, b in zip(before, engine.model.parameters(), strict=True))
        if mesh.is_first:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
