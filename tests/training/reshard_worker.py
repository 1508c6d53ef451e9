"""Run under torchrun on 4 ranks by test_reshard.py: one checkpoint handed from layout to layout.

Usage: reshard_worker.py FOLDER PREPARED DTYPE. Each layout resumes what the one before has saved, compares every
tensor by name with the first checkpoint, saves, and trains one more step on its own copy. Writes FOLDER/DTYPE.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.worker import plan_of
from titans_train.data import open_dataset
from titans_train.models.tree import tensors_of
from titans_train.parallel import Engine, Mesh, gather, mesh_of, process_group
from titans_train.parallel.pieces import KINDS
from titans_train.plan import Plan
from titans_train.training import run_folder
from titans_train.training.carried import CarriedStates
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.checkpoint_saver import Saver
from titans_train.training.checkpoint_writer import random_state
from titans_train.training.loop import build_engine, train_on
from titans_train.training.resume import resume

# (tensor, sequence, ZeRO stage), over 4 ranks; the rest is data parallel
LAYOUTS = [
    (1, 1, 1), (1, 1, 0), (2, 1, 0), (2, 2, 1), (1, 1, 3), (2, 2, 3), (4, 1, 2), (2, 1, 3), (1, 4, 2), (1, 2, 3),
    (4, 1, 3), (1, 4, 1), (2, 2, 2), (1, 1, 2),
]  # fmt: skip
STEPS = 3


def layouts_of(dtype: str) -> list[tuple[int, int, int]]:
    """All in float32; in bfloat16, which needs ZeRO, a few."""
    return LAYOUTS if dtype == "float32" else [layout for layout in LAYOUTS[::3] if layout[2]]


def plan(folder: Path, prepared: Path, name: str, layout: tuple[int, int, int], dtype: str) -> Plan:
    tensor, sequence, stage = layout
    return plan_of(
        folder, prepared, name, stage, 4,
        run={"dtype": dtype},
        model={"heads": 4},
        parallel={"tensor": tensor, "sequence": sequence, "zero_stage": stage, "sequence_parallel": tensor > 1},
        training={"steps": STEPS + 1, "carry_state": True},
        monitoring={"validate_every": None, "sample_every": None, "tensorboard": False, "validation_sequences": 4},
    )  # fmt: skip


def differences(engine: Engine, first: Checkpoint) -> dict[str, float]:
    """By kind, the largest difference of any tensor from the first checkpoint's, infinite where one is missing."""
    found = {}
    for kind in KINDS:
        values = engine.parameters() if kind == "parameters" else engine.moments(kind)
        compared = {name: float((value.cpu() - first.tensor(kind, name)).abs().max()) for name, value in values}
        found[kind] = max(compared.values()) if set(compared) == set(first.names()) else float("inf")
    return found


def carried_rows(carried: CarriedStates) -> list[torch.Tensor]:
    """Every tensor that all rows carry, whole, rows in order, on every rank. Collective."""
    own = carried.snapshot()
    parts = dict(pair for pair in gather(None if own is None else (own[0], tensors_of(own[1]))) if pair)
    return [torch.cat(tensors).double() for tensors in zip(*(parts[name] for name in sorted(parts)), strict=True)]


def one(mesh: Mesh, here: Plan, first: Checkpoint, expected: list[torch.Tensor], say: list[str]) -> dict[str, Any]:
    data = open_dataset(here.config, "train", here.shape.document_alignment)
    engine, carried = build_engine(here, mesh), CarriedStates(here, mesh)
    torch.manual_seed(99)
    progress = resume(engine, here, data, mesh, carried)
    rows = carried_rows(carried)
    result = {
        **differences(engine, first), "step": progress.step, "optimizer_step": engine.optimizer_step(),
        "carried": max(float((a - b).abs().max()) for a, b in zip(rows, expected, strict=True)),
        "random": random_state()["cpu"] == first.manifest["random"]["cpu"],
    }  # fmt: skip
    if mesh.is_first:  # this layout is to write it all again
        shutil.rmtree(here.run_directory / "checkpoints")
    saver = Saver(engine, here, data, mesh, carried, say.append)
    saver.save(progress)
    saver.finish()
    return result


def main(folder: Path, prepared: Path, dtype: str) -> None:
    layouts = layouts_of(dtype)
    results, said = [], []
    with process_group() as mesh:
        start = plan(folder, prepared, f"{dtype}-0", layouts[0], dtype)
        train_on(mesh, start, stop_after=STEPS)
        first = Checkpoint.open(start.run_directory / "checkpoints" / f"step-{STEPS:08d}")
        carried = CarriedStates(start, mesh)
        carried.load(first.path, first.carried)
        expected = carried_rows(carried)
        for number, layout in enumerate(layouts[1:], 1):
            here = plan(folder, prepared, f"{dtype}-{number}", layout, dtype)
            with mesh_of(layout[0], layout[1]) as cut:
                if mesh.is_first:
                    before = folder / f"{dtype}-{number - 1}" / "checkpoints" / first.path.name
                    shutil.copytree(before, here.run_directory / "checkpoints" / first.path.name)
                    run_folder.write(here)
                torch.distributed.barrier()
                results.append({"layout": layout, **one(cut, here, first, expected, said)})
                train_on(cut, here)  # goes on
    if mesh.is_first:
        (folder / f"{dtype}.json").write_text(json.dumps({"results": results, "said": said}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
