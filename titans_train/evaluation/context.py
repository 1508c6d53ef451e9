"""What every evaluation is given: the model on its layout, the run it comes from, and one voice for all ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from titans_train.config import RunConfig, check_config
from titans_train.config.errors import ConfigError
from titans_train.evaluation.scoring import Scorer
from titans_train.parallel import Mesh, process_group
from titans_train.parallel.loading import load_model
from titans_train.parallel.shards import ShardSettings

if TYPE_CHECKING:
    from data_prep.tokenizer import Tokenizer
    from titans_train.inference.source import Source


@dataclass(frozen=True)
class Context:
    source: Source
    config: RunConfig
    mesh: Mesh
    scorer: Scorer
    about: dict[str, Any] = field(default_factory=dict)  # which checkpoint, for the JSON

    @property
    def model(self) -> Any:
        return self.scorer.module

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the run's data. UserError: it was trained on a synthetic task."""
        from titans_train.inference.source import tokenizer_of

        return tokenizer_of(self.source)

    def say(self, text: str) -> None:
        if self.mesh.is_first:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


@contextmanager
def opened(source: Source, batch: int | None = None) -> Iterator[Context]:
    """The model of `source` on the processes that were started: one alone, or as many as parallel.* of its config asks
    for, and times any number of data-parallel ranks. UserError: another number; a config of another model.
    """
    from titans_train.inference.source import shape_of

    config, shape = source.config, shape_of(source)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        config = config.model_copy(update={"parallel": type(config.parallel)()})
    parallel = config.parallel
    if problems := [p for p in check_config(config, world) if p.path.startswith("parallel.")]:
        raise ConfigError(problems, f"{source.checkpoint} on {world} processes")
    shards = None
    if parallel.sequence > 1:
        shards = ShardSettings(config.training.sequence_length // parallel.sequence, parallel.pieces or 1)
    with process_group(parallel.tensor, parallel.sequence) as mesh:
        model = load_model(shape, source.stored, mesh, parallel.sequence_parallel, shards)
        scorer = Scorer(model, mesh, batch or config.training.micro_batch_size)
        about = {"checkpoint": str(source.checkpoint), "step": source.record["step"], "block": shape.block}
        yield Context(source, config, mesh, scorer, about)
