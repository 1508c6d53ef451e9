"""Run under torchrun by test_training.py: several trainings in one process group, so that start-up is paid once.

Usage: worker.py FOLDER PREPARED. Trains, under each ZeRO stage, a whole run, and one that stops and resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from titans_train.config import RunConfig
from titans_train.parallel import Mesh, mesh_of, process_group
from titans_train.plan import Plan, make_plan
from titans_train.training.loop import train_on

STEPS = 5


def plan_of(folder: Path, prepared: Path, name: str, stage: int, ranks: int, **changes: Any) -> Plan:
    config: dict[str, Any] = {
        "run": {"name": name, "folder": str(folder)},
        "model": {"block": "mag", "layers": 2, "width": 32, "heads": 2, "vocabulary": 264},
        "memory": {"chunk_size": 8, "expansion": 2},
        "attention": {"window": 16},
        "parallel": {"zero_stage": stage},
        "data": {"path": str(prepared), "workers": 0},
        "training": {"steps": STEPS, "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": 2},
        "monitoring": {
            "log_every": 1,
            "validation_sequences": 5,
            "validate_every": 2,
            "peak_flops": 1e11,
            "sample_every": 4,
            "sample_tokens": 8,
        },
    }
    for section, values in changes.items():
        config[section] |= values
    return make_plan(RunConfig.model_validate(config), ranks)


def main(folder: Path, prepared: Path) -> None:
    with process_group() as mesh:
        for stage in range(4):
            ranks = mesh.world_size
            train_on(mesh, plan_of(folder, prepared, f"whole-{stage}", stage, ranks))
            parts = plan_of(folder, prepared, f"parts-{stage}", stage, ranks)
            train_on(mesh, parts, stop_after=3)  # step 3 is no multiple of checkpoint.every: stopping saves
            train_on(mesh, parts)
        # half of a run on ZeRO 1, the rest on ZeRO 3 with another micro-batch
        train_on(mesh, plan_of(folder, prepared, "moved", 1, mesh.world_size), stop_after=3)
        train_on(mesh, plan_of(folder, prepared, "moved", 3, mesh.world_size, training={"micro_batch_size": 2}))
        # the same run on other layouts: tensor and sequence parallel, then data parallel, and back
        split = {"parallel": {"tensor": 2, "sequence_parallel": True, "zero_stage": 1}}
        with mesh_of(tensor=2) as halves:
            train_on(halves, plan_of(folder, prepared, "split", 1, 2, **split))
            train_on(halves, plan_of(folder, prepared, "to-data", 1, 2, **split), stop_after=3)
            odd = {"sequence_length": 65, "micro_batch_size": 2, "steps": 3}  # 5 validation sequences: 2, 2 and 1
            train_on(halves, plan_of(folder, prepared, "odd", 1, 2, **split, memory={"chunk_size": 5}, training=odd))
        train_on(mesh, plan_of(folder, prepared, "to-data", 3, 2))
        train_on(mesh, plan_of(folder, prepared, "to-tensor", 2, 2), stop_after=3)
        with mesh_of(tensor=2) as halves:
            train_on(halves, plan_of(folder, prepared, "to-tensor", 3, 2, parallel={"tensor": 2, "zero_stage": 3}))
        shards(mesh, folder, prepared)
        bf16 = plan_of(folder, prepared, "bf16", 2, mesh.world_size, run={"dtype": "bfloat16"})
        train_on(mesh, bf16, stop_after=3)
        train_on(mesh, bf16)


def shards(mesh: Mesh, folder: Path, prepared: Path) -> None:
    """Sequence shards, alone and before and after data parallelism; and rows that go on in the next batch."""
    two = {"parallel": {"sequence": 2, "pieces": 2}, "training": {"micro_batch_size": 1}}
    waves = {"parallel": {"sequence": 2, "zero_stage": 2, "wave": 2}}
    carry = {"carry_state": True}
    carried = {"parallel": {"sequence": 2}, "training": carry}
    train_on(mesh, plan_of(folder, prepared, "to-shards", 1, 2), stop_after=3)
    train_on(mesh, plan_of(folder, prepared, "carried", 1, 2, training=carry))
    with mesh_of(sequence=2) as halves:
        train_on(halves, plan_of(folder, prepared, "shards", 1, 2, **two))
        train_on(halves, plan_of(folder, prepared, "to-shards", 2, 2, **waves))
        train_on(halves, plan_of(folder, prepared, "carried-shards", 1, 2, **carried), stop_after=3)
    with mesh_of(tensor=2) as heads:
        changed = {"parallel": {"tensor": 2}, "training": {**carry, "micro_batch_size": 2}}
        train_on(heads, plan_of(folder, prepared, "carried-shards", 1, 2, **changed), stop_after=1)
    train_on(mesh, plan_of(folder, prepared, "carried-shards", 1, 2, training=carry))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
