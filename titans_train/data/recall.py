"""Associative recall: a synthetic task that only a model with memory across the gap can do.

A sequence: `pairs` times key, value; `gap` fillers; each key once more in random order, followed by its value;
padding to the end. Labels are at the positions of the queried keys only (label = the value), so accuracy on the
labelled positions is the recall, and chance is 1 / values.

Token ids: keys 0..keys-1, values keys..keys+values-1, then one filler, then one for padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from titans_train.data.cursor import Cursor
from titans_train.data.errors import DataError
from titans_train.data.order import permutation, random_bits
from titans_train.data.sample import IGNORE, Sample
from titans_train.mixing import Weights

if TYPE_CHECKING:
    from titans_train.config.schema import Recall, RunConfig

_SPLIT_KEY = {"train": 0, "validation": 1}
_SEQUENCES_TOTAL = {"train": 1 << 24, "validation": 1 << 10}


def tokens_needed(recall: Recall) -> int:
    """Shortest sequence that holds the task."""
    return 4 * recall.pairs + recall.gap


def vocabulary_needed(recall: Recall) -> int:
    return recall.keys + recall.values + 2


class RecallDataset:
    """Sequences by number, made on the fly from (seed, split, number)."""

    bytes_per_token: float | None = None  # there is no text behind the tokens
    dropped_tokens = 0
    padding_share = 0.0

    def __init__(self, recall: Recall, seed: int, split: str, sequence_length: int, vocabulary: int) -> None:
        """DataError when the task does not fit the sequence length, the vocabulary or its own number of keys."""
        if recall.pairs > recall.keys:
            raise DataError(f"data.recall.pairs {recall.pairs} > data.recall.keys {recall.keys}; keys do not repeat")
        if tokens_needed(recall) > sequence_length:
            raise DataError(
                f"recall needs 4 * pairs + gap = {tokens_needed(recall)} tokens, training.sequence_length is "
                f"{sequence_length}; raise it or lower data.recall.pairs or gap"
            )
        if vocabulary_needed(recall) > vocabulary:
            raise DataError(
                f"recall needs keys + values + 2 = {vocabulary_needed(recall)} token ids, model.vocabulary is "
                f"{vocabulary}; raise it"
            )
        self._recall = recall
        self._key = (seed, 0x7265, _SPLIT_KEY[split])
        self.length = sequence_length
        self.sequences_total = _SEQUENCES_TOTAL[split]
        settings = json.dumps([recall.model_dump(), *self._key], sort_keys=True)
        self.weights: Weights = ((0, {"recall": 1.0}),)
        self.tokenizer: dict[str, str] | None = None
        self.fingerprints = {"recall": hashlib.sha256(settings.encode()).hexdigest()[:16]}

    @classmethod
    def from_config(cls, config: RunConfig, split: str) -> RecallDataset:
        if config.data.recall is None:
            raise DataError("data.source is recall but there is no section data.recall; add it")
        length, vocabulary = config.training.sequence_length, config.model.vocabulary
        return cls(config.data.recall, config.run.seed, split, length, vocabulary)

    def at(self, cursor: Cursor) -> RecallDataset:
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
        task, key = self._recall, (*self._key, number)
        keys = permutation(task.keys, *key, 0)[: task.pairs]
        values = task.keys + (random_bits(task.pairs, *key, 1) % np.uint64(task.values)).astype(np.int64)
        queries = permutation(task.pairs, *key, 2)
        filler, padding = task.keys + task.values, task.keys + task.values + 1

        tokens = np.full(self.length, padding, np.int64)
        labels = np.full(self.length, IGNORE, np.int64)
        pairs_end = 2 * task.pairs
        asked = pairs_end + task.gap
        tokens[0:pairs_end:2], tokens[1:pairs_end:2] = keys, values
        tokens[pairs_end:asked] = filler
        tokens[asked : asked + pairs_end : 2] = keys[queries]
        tokens[asked + 1 : asked + pairs_end : 2] = values[queries]
        labels[asked : asked + pairs_end : 2] = values[queries]
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), None)
