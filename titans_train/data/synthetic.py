"""Sequences made on the fly for a task that only a memory can do, from (seed, split, number) alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from titans_train.data.cursor import Cursor
from titans_train.data.errors import DataError
from titans_train.data.needles import NeedlesTask
from titans_train.data.recall import RecallTask
from titans_train.data.sample import IGNORE, Sample
from titans_train.mixing import Weights

if TYPE_CHECKING:
    from titans_train.config.schema import RunConfig

_SPLIT_KEY = {"train": 0, "validation": 1}
_SEQUENCES_TOTAL = {"train": 1 << 24, "validation": 1 << 10}

TASKS: dict[str, Any] = {"recall": RecallTask, "needles": NeedlesTask}  # by data.source


class Task(Protocol):
    name: str
    tag: int  # part of the key of its random numbers
    settings: Any  # a section of the config

    def problem(self, length: int, vocabulary: int) -> str | None:
        """Why the task does not fit sequences of so many tokens, or so many token ids."""

    def draw(self, key: tuple[int, ...], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """tokens and labels [length]; the label of a position is the token after it, or IGNORE."""


class SyntheticDataset:
    """Sequences by number."""

    bytes_per_token: float | None = None  # there is no text behind the tokens
    dropped_tokens = 0
    padding_share = 0.0

    def __init__(self, task: Task, seed: int, split: str, length: int, vocabulary: int) -> None:
        """DataError when the task does not fit the sequence length, the vocabulary or itself."""
        if problem := task.problem(length, vocabulary):
            raise DataError(problem)
        self.task = task
        self._key = (seed, task.tag, _SPLIT_KEY[split])
        self.length = length
        self.sequences_total = _SEQUENCES_TOTAL[split]
        settings = json.dumps([task.settings.model_dump(), *self._key], sort_keys=True)
        self.weights: Weights = ((0, {task.name: 1.0}),)
        self.tokenizer: dict[str, str] | None = None
        self.fingerprints = {task.name: hashlib.sha256(settings.encode()).hexdigest()[:16]}

    @classmethod
    def from_config(cls, config: RunConfig, split: str) -> SyntheticDataset:
        source = config.data.source
        settings = getattr(config.data, source)
        if settings is None:
            raise DataError(f"data.source is {source} but there is no section data.{source}; add it")
        length, vocabulary = config.training.sequence_length, config.model.vocabulary
        return cls(TASKS[source](settings), config.run.seed, split, length, vocabulary)

    def at(self, cursor: Cursor) -> SyntheticDataset:
        """The same: no step changes it."""
        return self

    def readers_started(self) -> None:
        pass

    def describe(self, sequences: int) -> list[str]:
        return []

    def figures(self, sequences: int) -> dict[str, dict[str, float]]:
        return {}

    def sequences(self, numbers: Sequence[int], begin: int = 0, end: int | None = None) -> Sample:
        """Positions [begin, end) of these sequences: tokens, labels [n, end - begin] int64; no document starts."""
        found = [self.sequence(number) for number in numbers]
        tokens, labels = (torch.stack([getattr(s, name)[begin:end] for s in found]) for name in ("tokens", "labels"))
        return Sample(tokens, labels, None)

    def sequence(self, number: int) -> Sample:
        """tokens, labels [length] int64; no document starts."""
        tokens, labels = self.task.draw((*self._key, number), self.length)
        assert len(tokens) == len(labels) == self.length and (labels != IGNORE).any()
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), None)
