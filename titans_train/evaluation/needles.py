"""Needles in haystacks of text, for any tokenizer: RULER's single-needle tasks (arXiv 2404.06654, appendix B).

A text of a given number of tokens is a haystack with one sentence in it, the needle, and ends with the question and the
beginning of the answer; what is asked for is the needle's value.

    passkey   haystack of five sentences over and over, a word as key, a number of 7 digits as value   (S-NIAH-1)
    number    haystack of a text that is given, the same                                              (S-NIAH-2)
    uuid      haystack of a text that is given, a UUID as value                                       (S-NIAH-3)
    word      haystack of a text that is given, a word as value

Titans' paper asks for passkey, number and word at 2K to 16K tokens.
"""

from __future__ import annotations

import random
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from titans_train.data.sample import IGNORE, Sample
from titans_train.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KINDS = ("passkey", "number", "uuid", "word")
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
FRAME = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n"
)
QUESTION = (
    "\nWhat is the special magic {one} for {key} mentioned in the provided text? The special magic {one} for {key} "
    "mentioned in the provided text is"
)
NAMES = {"passkey": ("numbers", "number"), "number": ("numbers", "number"), "uuid": ("uuids", "uuid")}
_ADJECTIVES = "amber brave calm dusty eager faint gentle hollow icy jolly keen lucid mellow noble odd pale quick rusty"
_NOUNS = "anchor basket candle desert engine feather garden harbor island jacket kettle ladder marble needle orchard"
WORDS = [f"{a}-{n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]


class Encoder(Protocol):
    vocabulary: int

    def encode(self, texts: list[str]) -> list[Any]: ...


@dataclass(frozen=True)
class Needle:
    """tokens [L]: prompt and answer; labels are at the answer's places."""

    tokens: list[int]
    answer: int  # its last tokens
    text: str  # of the needle
    value: str


class NeedleTask:
    """Texts of exactly `length` tokens with the needle at a depth of 0 (start) to 1 (end) of the haystack."""

    def __init__(self, kind: str, tokenizer: Encoder, haystack: str | None = None, seed: int = 0) -> None:
        """haystack: text of any length, repeated as needed; for all kinds but passkey. UserError without one."""
        if kind not in KINDS:
            raise UserError(f"there is no needle {kind!r}; choose of {', '.join(KINDS)}")
        if kind != "passkey" and not (haystack or "").strip():
            raise UserError(f"needles of kind {kind} are hidden in a text: give --haystack FILE")
        self.kind, self.tokenizer, self.seed = kind, tokenizer, seed
        text = NOISE if kind == "passkey" else haystack or ""
        self.sentences = [self._encode(sentence) for sentence in _sentences(text)]

    def _encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode([text])[0]]

    def sample(self, length: int, depths: Sequence[float], numbers: Sequence[int]) -> Sample:
        """Texts `numbers`, number n at depth depths[n % len(depths)]: tokens and labels [n, length - 1]."""
        rows = [self.needle(length, depths[n % len(depths)], n) for n in numbers]
        tokens = torch.tensor([row.tokens for row in rows])
        labels = tokens[:, 1:].clone()
        for row, needle in zip(labels, rows, strict=True):
            row[: length - 1 - needle.answer] = IGNORE
        return Sample(tokens[:, :-1], labels, None)

    def needle(self, length: int, depth: float, number: int) -> Needle:
        """UserError where so few tokens do not hold needle and question."""
        draw = random.Random(f"{self.seed}/{self.kind}/{length}/{number}")
        key, value = draw.choice(WORDS), self._value(draw)
        plural, one = NAMES.get(self.kind, ("words", "word"))
        before = self._encode(FRAME.format(kind=plural))
        sentence = NEEDLE.format(kind=plural, key=key, value=value)
        needle, question = self._encode(sentence + " "), self._encode(QUESTION.format(one=one, key=key))
        answer = self._encode(f" {value}")
        free = length - len(before) - len(needle) - len(question) - len(answer)
        if free < 0:
            raise UserError(
                f"a needle of kind {self.kind} and its question take {length - free} tokens of this tokenizer, but "
                f"texts of {length} are wanted; use longer ones"
            )
        hay, cut = self._hay(free, round(depth * free), draw)
        tokens = [*before, *hay[:cut], *needle, *hay[cut:], *question, *answer]
        return Needle(tokens, len(answer), sentence, value)

    def _value(self, draw: random.Random) -> str:
        if self.kind == "uuid":
            return str(uuid.UUID(int=draw.getrandbits(128), version=4))
        return draw.choice(WORDS) if self.kind == "word" else str(draw.randrange(10**6, 10**7))

    def _hay(self, count: int, place: int, draw: random.Random) -> tuple[list[int], int]:
        """So many tokens of whole sentences (the last is cut), from a random one on; the sentence border at `place`."""
        at = 0 if self.kind == "passkey" else draw.randrange(len(self.sentences))
        hay: list[int] = []
        border = 0
        while len(hay) < count:
            if len(hay) <= place:
                border = len(hay)
            hay += self.sentences[at % len(self.sentences)]
            at += 1
        return hay[:count], count if place >= count else border


def _sentences(text: str) -> list[str]:
    """With what follows each full stop, so that joined they are the text again."""
    parts = text.replace("\n", " ").split(". ")
    return [f"{part}. " for part in parts if part.strip()]
