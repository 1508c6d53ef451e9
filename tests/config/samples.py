"""A small valid config as text, for tests to break."""

from __future__ import annotations

from pathlib import Path

from titans_train.config import ConfigError, Problem, RunConfig, load_config

TEXT = """
run: {name: test}
model: {block: mag, layers: 2, width: 32, heads: 4, vocabulary: 264}
memory: {chunk_size: 16}
attention: {window: 32, segment: 32}
data: {path: data/x}
training: {steps: 10, sequence_length: 64, global_batch_size: 8, micro_batch_size: 2}
"""


def write(folder: Path, text: str = TEXT, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write(folder), overrides)


def problems(path: Path, *overrides: str, world_size: int | None = None) -> dict[str, Problem]:
    """The problems of a refused config by path; fails if it is accepted, or names a path twice."""
    try:
        load_config(path, overrides, world_size)
    except ConfigError as error:
        found = {p.path: p for p in error.problems}
        assert len(found) == len(error.problems), str(error)
        return found
    raise AssertionError(f"{path} with {overrides} was accepted")
