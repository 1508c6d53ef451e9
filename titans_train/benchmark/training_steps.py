"""Training steps of a config in this process: the engine and the step that training uses, on random tokens.

Reads no data and writes nothing. One process: parallel.tensor and parallel.sequence are 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from titans_train.benchmark import device
from titans_train.config import RunConfig, load_config
from titans_train.data import Batch
from titans_train.host import keep_freed_memory
from titans_train.parallel import Engine, process_group
from titans_train.plan import Plan, make_plan
from titans_train.training.loop import build_engine
from titans_train.training.step import train_step

OVERRIDE = re.compile(r"[a-z_]+(\.[A-Za-z0-9_]+)+=")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is key.path=value, and the rest."""
    overrides = [argument for argument in argv if OVERRIDE.match(argument)]
    return overrides, [argument for argument in argv if argument not in overrides]


def checked_device(name: str | None) -> str:
    """None: a GPU where there is one, as training does. UserError: it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    device.check(name)
    return name


def plan_of(path: Path, overrides: Sequence[str], micro_batches: int, length: int | None = None) -> Plan:
    """Of the config with so many micro-batches per step.

    length: of sequences in place of the config's; a micro-batch keeps its number of tokens as far as it can.
    ConfigError: as `load_config` and `make_plan`.
    """
    config: RunConfig = load_config(path, overrides)
    t = config.training
    length = t.sequence_length if length is None else length
    rows = max(1, t.micro_batch_size * t.sequence_length // length)
    changed = {"sequence_length": length, "micro_batch_size": rows, "global_batch_size": rows * micro_batches}
    return make_plan(config.model_copy(update={"training": t.model_copy(update=changed)}))


@dataclass(frozen=True)
class TrainingSteps:
    plan: Plan
    engine: Engine
    batches: list[Batch]

    def step(self) -> None:
        train_step(self.engine, self.batches, self.plan.config.optimizer.learning_rate)


@contextmanager
def training_steps(plan: Plan) -> Iterator[TrainingSteps]:
    """Every step has the same batch."""
    with process_group() as mesh:
        engine = build_engine(plan, mesh)
        keep_freed_memory()  # as training does
        yield TrainingSteps(plan, engine, [_batch(plan, n) for n in range(plan.accumulation)])


def _batch(plan: Plan, number: int) -> Batch:
    """A micro-batch of random tokens."""
    t = plan.config.training
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(plan.shape.vocabulary, (t.micro_batch_size, t.sequence_length + 1), generator=generator)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, [])
