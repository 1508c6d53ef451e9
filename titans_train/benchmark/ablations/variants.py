"""What is trained: variants of the tasks' configs, with equally many parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from titans_train.config import RunConfig, load_config
from titans_train.config.checks import feed_forward_width
from titans_train.errors import UserError
from titans_train.plan import resolve_shape
from titans_train.plan_counts import parameters

FOLDER = Path("configs/ablations")
TASKS = ("needles", "recall", "text")
REFERENCE = "lmm"
STEP = 8  # feed-forward units are fitted in steps of so many
CLOSE = 0.02  # how far from the reference's parameters a variant may be


@dataclass(frozen=True)
class Variant:
    name: str
    change: tuple[str, ...]
    paper: tuple[float, float] | None  # perplexity, long-context score
    seeds: int
    tasks: tuple[str, ...] = TASKS

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Run:
    task: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant.slug}-{self.seed}"

    def config(self, folder: Path, overrides: list[str]) -> RunConfig:
        """`overrides` of every run, before the variant's own. Parameters as the reference has them."""
        path, common = folder / f"{self.task}.yaml", [*overrides, f"run.seed={self.seed}", f"run.name={self.name}"]
        return fitted(load_config(path, [*common, *self.variant.change]), load_config(path, common))


def load_variants(folder: Path = FOLDER) -> list[Variant]:
    """UserError: no such file, or something in it that is no variant."""
    path = folder / "variants.yaml"
    try:
        entries: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
        variants = [
            Variant(
                name,
                tuple(e["change"]),
                tuple(e["paper"]) if e.get("paper") else None,
                int(e.get("seeds", 1)),
                tuple(e.get("tasks", TASKS)),
            )
            for name, e in entries.items()
        ]
        if not variants or not all(v.tasks and v.seeds > 0 and {*v.tasks} <= {*TASKS} for v in variants):
            raise ValueError(f"variants have tasks out of {', '.join(TASKS)} and at least one seed")
        return variants
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no list of variants: {error}; take the one of the project as pattern") from error


def count(config: RunConfig) -> int:
    return sum(parameters(resolve_shape(config)).values())


def fitted(config: RunConfig, reference: RunConfig) -> RunConfig:
    """With the feed-forward that brings the number of parameters nearest to the reference's."""
    wanted, per_unit = count(reference), 3 * config.model.width * config.model.layers
    now = feed_forward_width(config.model)
    units = max(STEP, now + STEP * round((wanted - count(config)) / (per_unit * STEP)))
    found = config.model_copy(update={"model": config.model.model_copy(update={"feed_forward": units})})
    if abs(count(found) / wanted - 1) > CLOSE:
        raise UserError(
            f"{config.run.name}: {count(found):,} parameters with model.feed_forward {units}, the reference has "
            f"{wanted:,}, further apart than {CLOSE:.0%}; give a larger model.feed_forward"
        )
    return found


def runs(variants: list[Variant], tasks: list[str], seeds: int | None = None) -> Iterator[Run]:
    """First seeds first: after an interruption as much as possible is whole. seeds: at most so many."""
    most = max(v.seeds for v in variants)
    for seed in range(most if seeds is None else min(most, seeds)):
        for variant in variants:
            if seed < variant.seeds:
                yield from (Run(task, variant, seed) for task in tasks if task in variant.tasks)
