"""Text to tokens, for texts that are put together of parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Encoder(Protocol):
    vocabulary: int

    def encode(self, texts: list[str]) -> list[Any]: ...


def encode(tokenizer: Encoder, text: str) -> Tokens:
    return np.asarray(tokenizer.encode([text])[0], np.int64)


def behind(tokenizer: Encoder, before: str, text: str) -> Tokens:
    """The tokens that a text has where it is written behind another: what both together have more than that one.

    A text by itself may have others: SentencePiece puts the sign of a word's beginning in front of it. It is encoded
    by itself only where the text before it has other tokens with it than without.
    """
    return all_behind(tokenizer, [before], [text])[0]


def all_behind(tokenizer: Encoder, before: Sequence[str], texts: Sequence[str]) -> list[Tokens]:
    """The same of many."""
    alone = tokenizer.encode(list(before))
    together = tokenizer.encode([a + b for a, b in zip(before, texts, strict=True)])
    found = []
    for first, both, text in zip(alone, together, texts, strict=True):
        same = len(both) > len(first) and np.array_equal(both[: len(first)], first)
        found.append(np.asarray(both[len(first) :], np.int64) if same else encode(tokenizer, text))
    return found


def pieces(text: str, size: int) -> list[str]:
    """A text in pieces of at most `size` characters, at least one. They begin with a space where there is one: a
    tokenizer that never joins a space to the word before it gives them the tokens that it gives the whole.
    """
    found, begin = [], 0
    while len(text) - begin > size:
        border = text.rfind(" ", begin + 1, begin + size)
        end = begin + size if border < 0 else border
        found.append(text[begin:end])
        begin = end
    return [*found, text[begin:]]
