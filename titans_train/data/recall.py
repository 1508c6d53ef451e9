"""Associative recall: a synthetic task that only a model with memory across the gap can do.

A sequence: `pairs` times key, value; `gap` fillers; each key once more in random order, and its value is asked for;
then padding. Labels are at the positions of the queried keys only (label = the value), so accuracy on the labelled
positions is the recall, and chance is 1 / values.

Without `spread` the queries follow each other, each with its value. With `spread` = a it is multi-query associative
recall as in Zoology (arXiv 2312.04927, appendix) and its published configs: values do not repeat, queries stand
anywhere in the rest of the sequence between fillers, gaps drawn from a density proportional to x^(a - 1), and no value
follows; a = 0.01 there.

Token ids: keys 0..keys-1, values keys..keys+values-1, then one filler, then one for padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from titans_train.data.order import permutation, random_bits
from titans_train.data.sample import IGNORE

if TYPE_CHECKING:
    from titans_train.config.schema import Recall

Integers = NDArray[np.int64]


class RecallTask:
    name, tag = "recall", 0x7265

    def __init__(self, settings: Recall) -> None:
        self.settings = settings

    def problem(self, length: int, vocabulary: int) -> str | None:
        task = self.settings
        needed, symbols = 4 * task.pairs + task.gap, task.keys + task.values + 2
        if task.pairs > task.keys:
            return f"data.recall.pairs {task.pairs} > data.recall.keys {task.keys}; keys do not repeat"
        if task.spread is not None and task.pairs > task.values:
            return f"data.recall.pairs {task.pairs} > data.recall.values {task.values}; with spread they do not repeat"
        if needed > length:
            return (
                f"recall needs 4 * pairs + gap = {needed} tokens, training.sequence_length is {length}; raise it or "
                "lower data.recall.pairs or gap"
            )
        if symbols > vocabulary:
            return f"recall needs keys + values + 2 = {symbols} token ids, model.vocabulary is {vocabulary}; raise it"
        return None

    def draw(self, key: tuple[int, ...], length: int) -> tuple[Integers, Integers]:
        task = self.settings
        keys = permutation(task.keys, *key, 0)[: task.pairs]
        if task.spread is None:
            values = task.keys + (random_bits(task.pairs, *key, 1) % np.uint64(task.values)).astype(np.int64)
        else:
            values = task.keys + permutation(task.values, *key, 1)[: task.pairs]
        queries = permutation(task.pairs, *key, 2)
        filler, padding = task.keys + task.values, task.keys + task.values + 1

        tokens = np.full(length, padding, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        pairs_end = 2 * task.pairs
        asked = pairs_end + task.gap
        tokens[0:pairs_end:2], tokens[1:pairs_end:2] = keys, values
        tokens[pairs_end:asked] = filler
        if task.spread is not None:
            places = asked + 2 * _gaps(task.pairs, (length - asked) // 2, task.spread, key)
            tokens[asked:] = filler
        else:
            places = asked + 2 * np.arange(task.pairs)
            tokens[places + 1] = values[queries]
        tokens[places], labels[places] = keys[queries], values[queries]
        return tokens, labels


def _gaps(count: int, slots: int, power: float, key: tuple[int, ...]) -> Integers:
    """`count` different numbers below `slots`, in random order, drawn with weights (x + 1)^(power - 1)."""
    uniform = (random_bits(slots, *key, 3) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    weights = np.arange(1, slots + 1, dtype=np.float64) ** (power - 1)
    # the k smallest of independent exponential times with these rates are a draw without replacement
    return np.argsort(-np.log1p(-uniform) / weights, kind="stable")[:count].astype(np.int64)
