"""Run under torchrun by test_faults.py: trainings in which something goes wrong on one rank, in one process group.

Usage: faults_worker.py FOLDER PREPARED (skips | slow). What is found, one JSON line per rank and case, goes to
FOLDER/found-RANK.jsonl.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.training.worker import plan_of
from titans_train.data import loader
from titans_train.errors import UserError
from titans_train.models import LanguageModel
from titans_train.parallel import Engine, Mesh, mesh_of, process_group
from titans_train.plan import Plan
from titans_train.training import loop
from titans_train.training.step import StepResult, train_step

BAD_STEP, COMPARED = 3, 4
QUIET: dict[str, dict[str, Any]] = {
    "monitoring": {"validate_every": None, "validation_sequences": 1, "sample_every": None, "tensorboard": False},
    "checkpoint": {"every": 100},
}
BF16 = {"run": {"dtype": "bfloat16"}}
TWO_HEADS, TWO_SHARDS = {"tensor": 2}, {"sequence": 2, "pieces": 2}
CARRY = {"training": {"carry_state": True}}

# name -> what is poisoned, ZeRO stage, further settings
SKIPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"stage-{stage}": ("gradient", stage, {}) for stage in range(4)},
    "loss-0": ("loss", 0, {}),
    **{f"bf16-{stage}": ("gradient", stage, BF16) for stage in (2, 3)},
    "bf16-loss": ("loss", 1, BF16),
    **{f"tensor-{stage}": ("gradient", stage, {"parallel": {**TWO_HEADS, "zero_stage": stage}}) for stage in (0, 3)},
    **{
        f"shards-{stage}": ("gradient", stage, {"parallel": {**TWO_SHARDS, "zero_stage": stage}}) for stage in (0, 2, 3)
    },
    "shards-loss": ("loss", 1, {"parallel": {**TWO_SHARDS, "zero_stage": 1}}),
    "carried": ("gradient", 1, CARRY),
    "carried-shards": ("loss", 1, {**CARRY, "parallel": {**TWO_SHARDS, "zero_stage": 1}}),
}


def plan_for(folder: Path, prepared: Path, name: str, stage: int, world: int, changes: dict[str, Any]) -> Plan:
    quiet = {section: {**values, **changes.get(section, {})} for section, values in QUIET.items()}
    return plan_of(folder, prepared, name, stage, world, **{**changes, **quiet})


def bits(engine: Engine) -> list[Tensor]:
    """All that a step may move on this rank: parameters, fp32 partitions, Adam's moments and counts."""
    own = [getattr(p, "ds_tensor", p) for p in engine.model.parameters()]
    state = [v for p, s in engine._base.state.items() for v in (p, *s.values())]
    return [t.detach().clone() for t in (*own, *state)]


@contextmanager
def instead_of_a_step(do: Callable[..., StepResult]) -> Iterator[None]:
    """`do(step, engine, …)` in place of train_step."""
    count = 0

    def counted(engine: Engine, *args: Any, **kwargs: Any) -> StepResult:
        nonlocal count
        count += 1
        return do(count, engine, *args, **kwargs)

    with mock.patch.object(loop, "train_step", counted):
        yield


@contextmanager
def poisoned_forward(what: str) -> Iterator[None]:
    """The next training forward has an infinite loss, or a gradient that is not a number."""
    forward, left = LanguageModel.forward, [1]

    def poisoned(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        if self.training and left:
            left.clear()
            assert isinstance(out.loss_sum, Tensor)
            if what == "loss":
                return replace(out, loss_sum=out.loss_sum + torch.inf)
            out.loss_sum.register_hook(lambda gradient: gradient * torch.nan)
        return out

    with mock.patch.object(LanguageModel, "forward", poisoned):
        yield


def poison(what: str, bad_rank: int, rank: int, found: dict[str, Any], bad_steps: tuple[int, ...]) -> Any:
    """One rank's `what` in those steps; `found` says whether anything has moved on this rank."""

    def do(step: int, engine: Engine, *args: Any, **kwargs: Any) -> StepResult:
        if step not in bad_steps:
            return train_step(engine, *args, **kwargs)
        before = bits(engine)
        with poisoned_forward(what if rank == bad_rank else "nothing"):
            result = train_step(engine, *args, **kwargs)
        after = bits(engine)
        found["moved"] = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        found["applied"], found["tensors"] = result.applied, len(before)
        return result

    return instead_of_a_step(do)


def withheld(step: int, engine: Engine, *args: Any, **kwargs: Any) -> StepResult:
    """Nothing at all is done in the bad step: what a skipped one should come to."""
    if step == BAD_STEP:
        return StepResult(torch.ones(2, dtype=torch.float64), torch.ones(1))
    return train_step(engine, *args, **kwargs)


def skips(mesh: Mesh, folder: Path, prepared: Path, say: Callable[..., None]) -> None:
    for name, (what, stage, changes) in SKIPS.items():
        parallel = changes.get("parallel", {})
        make = partial(plan_for, folder, prepared, stage=stage, world=mesh.world_size, changes=changes)
        found: dict[str, Any] = {}
        with mesh_of(parallel.get("tensor", 1), parallel.get("sequence", 1)) as own:
            with poison(what, 1, mesh.rank, found, (BAD_STEP,)):
                loop.train_on(own, make(name=f"{name}-skipped"))
            with instead_of_a_step(withheld):
                loop.train_on(own, make(name=f"{name}-withheld"))
        say(name, **found)
    few = plan_for(folder, prepared, "budget", 1, mesh.world_size, {"training": {"skip_nonfinite": 1}})
    with poison("loss", 0, mesh.rank, {}, (2, 3)):
        say("budget", error=error_of(lambda: loop.train_on(mesh, few)))
    flips(mesh, folder, prepared, say, {"flip-whole": (1, {}), "flip-rows": (3, {})})


def flips(
    mesh: Mesh, folder: Path, prepared: Path, say: Callable[..., None], cases: dict[str, tuple[int, dict[str, Any]]]
) -> None:
    """On the last rank one bit of one number changes after the update of step 4, when copies are compared."""
    for name, (stage, changes) in cases.items():

        def flip(step: int, engine: Engine, *args: Any, **kwargs: Any) -> StepResult:
            result = train_step(engine, *args, **kwargs)
            if step == COMPARED and mesh.rank == mesh.world_size - 1:
                vector = dict(engine.model.named_parameters())["norm.scale"]
                vector.detach().view(torch.int32)[0] ^= 1
            return result

        changes = {**changes, "monitoring": {"compare_every": 2}, "checkpoint": {"every": 1}}
        plan = plan_for(folder, prepared, name, stage, mesh.world_size, changes)
        with mesh_of(changes.get("parallel", {}).get("tensor", 1)) as own, instead_of_a_step(flip):
            say(name, error=error_of(partial(loop.train_on, own, plan)))


def slow(mesh: Mesh, folder: Path, prepared: Path, say: Callable[..., None]) -> None:
    """Four ranks, two by two: one of them sleeps in its forward, then while it waits for data; then a flipped bit."""
    settings = {"parallel": {"tensor": 2, "zero_stage": 1}, "monitoring": {"log_every": 2}}
    forward = LanguageModel.forward

    def late_forward(self: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        time.sleep(1 if mesh.rank == 2 else 0)
        return forward(self, *args, **kwargs)

    def late_data(*args: Any) -> Iterator[Any]:
        for batch in loader(*args):
            time.sleep(1 if mesh.rank == 1 else 0)
            yield batch

    with mesh_of(tensor=2) as own:
        with mock.patch.object(LanguageModel, "forward", late_forward):
            loop.train_on(own, plan_for(folder, prepared, "slow-forward", 1, 4, settings))
        with mock.patch.object(loop, "loader", late_data):
            loop.train_on(own, plan_for(folder, prepared, "slow-data", 1, 4, settings))
    sharing = {"tensor": 2, "sequence_parallel": True}
    flips(mesh, folder, prepared, say, {
        "flip-data": (1, {"training": {"micro_batch_size": 1}}),
        "flip-tensor": (0, {"parallel": {**sharing, "zero_stage": 0}}),
        "flip-parts": (3, {"parallel": {**sharing, "zero_stage": 3}}),
    })  # fmt: skip


def error_of(run: Callable[[], object]) -> str | None:
    try:
        run()
    except UserError as error:
        assert error.agreed
        return str(error)
    return None


def main(folder: Path, prepared: Path, what: str) -> None:
    with process_group() as mesh, (folder / f"found-{mesh.rank}.jsonl").open("w") as file:

        def say(name: str, **found: Any) -> None:
            file.write(json.dumps({"name": name, **found}) + "\n")

        {"skips": skips, "slow": slow}[what](mesh, folder, prepared, say)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
