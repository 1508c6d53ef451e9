"""A needle in a haystack, in tokens: what RULER's single-needle task asks (arXiv 2404.06654), without a language.

A sequence is a haystack of random words; somewhere in it `needles` times [mark, key, value ...], and at its end
[question, key] of one of them, whose value is asked for. Labels are at the value's tokens alone: a sequence is right
if all of them are. Chance is symbols ^ -digits.

Token ids: 0 mark, 1 question, then `keys` keys, `symbols` symbols of values, `words` words. Nothing in the haystack
looks like a needle, so that what is hard is to keep it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from titans_train.data.order import permutation, random_bits
from titans_train.data.sample import IGNORE

if TYPE_CHECKING:
    from titans_train.config.schema import Needles

Integers = NDArray[np.int64]
MARK, QUESTION, KEYS = 0, 1, 2


class NeedlesTask:
    name, tag = "needles", 0x6E65

    def __init__(self, settings: Needles) -> None:
        self.settings = settings

    @property
    def vocabulary(self) -> int:
        return KEYS + self.settings.keys + self.settings.symbols + self.settings.words

    def problem(self, length: int, vocabulary: int) -> str | None:
        task = self.settings
        needed = (task.needles + 1) * (2 + task.digits)
        if task.needles > task.keys:
            return f"data.needles.needles {task.needles} > data.needles.keys {task.keys}; keys do not repeat"
        if needed > length:
            return (
                f"needles need (needles + 1) * (2 + digits) = {needed} tokens, sequences have {length}; use longer "
                "ones, or lower data.needles.needles or digits"
            )
        if self.vocabulary > vocabulary:
            return (
                f"needles need 2 + keys + symbols + words = {self.vocabulary} token ids, model.vocabulary is "
                f"{vocabulary}; raise it"
            )
        return None

    def draw(self, key: tuple[int, ...], length: int, depth: float | None = None) -> tuple[Integers, Integers]:
        """depth: where the needle that is asked for begins, as a share of the haystack, 0 to 1; None: anywhere."""
        task = self.settings
        size = 2 + task.digits
        values = KEYS + task.keys + _below(task.symbols, task.needles * task.digits, key, 0).reshape(-1, task.digits)
        keys = KEYS + permutation(task.keys, *key, 1)[: task.needles]
        hay = length - (task.needles + 1) * size
        words = KEYS + task.keys + task.symbols + _below(task.words, hay, key, 2)
        places = _below(hay + 1, task.needles, key, 3)  # words before each needle; the first is asked for
        if depth is not None:
            places[0] = round(depth * hay)
        order = np.argsort(places, kind="stable")
        parts, done = [], 0
        for n in order.tolist():
            parts += [words[done : places[n]], np.array([MARK, keys[n], *values[n]])]
            done = places[n]
        tokens = np.concatenate([*parts, words[done:], np.array([QUESTION, keys[0], *values[0]])]).astype(np.int64)
        labels = np.full(length, IGNORE, np.int64)
        labels[-task.digits - 1 : -1] = values[0]
        return tokens, labels


def _below(limit: int, count: int, key: tuple[int, ...], part: int) -> Integers:
    return (random_bits(count, *key, part) % np.uint64(limit)).astype(np.int64)
