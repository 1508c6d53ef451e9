"""From what a user names (a config, a run folder, a checkpoint) to a model and its tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_train.config import RunConfig, load_config
from titans_train.errors import UserError


@dataclass(frozen=True)
class Source:
    checkpoint: Path
    config: RunConfig  # of the run that wrote it; with a CONFIG.yaml, that file with its overrides


def find(name: str, overrides: list[str]) -> Source:
    """UserError where there is no complete checkpoint."""
    from titans_train.training.checkpoint import find_latest, read_state

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        config = load_config(path, overrides)
        run = Path(config.run.folder) / config.run.name
        return Source(_latest(find_latest(run), run), config)
    if overrides:
        raise UserError(f"overrides ({', '.join(overrides)}) go with a CONFIG.yaml, not with {name}")
    checkpoint = path if (path / "state.json").exists() else _latest(find_latest(path), path)
    return Source(checkpoint, RunConfig.model_validate(json.loads(json.dumps(read_state(checkpoint)["config"]))))


def _latest(found: Path | None, run: Path) -> Path:
    if found is None:
        raise UserError(f"{run} holds no complete checkpoint; train first: python -m titans_train train CONFIG.yaml")
    return found


def tokenizer_of(config: RunConfig) -> Any:
    """The tokenizer that the run's data were prepared with."""
    from data_prep.tokenizer import load_prepared_tokenizer

    if config.data.source != "shards" or config.data.path is None:
        raise UserError(f"data.source {config.data.source!r} has no text; generate needs a run on prepared text")
    return load_prepared_tokenizer(Path(config.data.path))
