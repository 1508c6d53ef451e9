"""Needles in haystacks of text, for any tokenizer: RULER's single-needle tasks (arXiv 2404.06654, appendix B).

A text of a given number of tokens is a haystack with one sentence in it, the needle, and ends with the question and the
beginning of the answer; what is asked for is the needle's value. The words are RULER's for a single needle
(scripts/data/synthetic/niah.py in github.com/NVIDIA/RULER).

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

import torch

from titans_train.data.sample import IGNORE, Sample
from titans_train.errors import UserError
from titans_train.evaluation.encoding import Encoder, behind, encode
from titans_train.evaluation.haystack import Haystack, sentences

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KINDS = ("passkey", "number", "uuid", "word")
NEEDLE = "One of the special magic {one}s for {key} is: {value}."
FRAME = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{one} afterwards.\n"
)
QUESTION = (
    "\nWhat is the special magic {one} for {key} mentioned in the provided text? The special magic {one} for {key} "
    "mentioned in the provided text is"
)
_ADJECTIVES = "amber brave calm dusty eager faint gentle hollow icy jolly keen lucid mellow noble odd pale quick rusty"
_NOUNS = "anchor basket candle desert engine feather garden harbor island jacket kettle ladder marble needle orchard"
WORDS = [f"{a}-{n}" for a in _ADJECTIVES.split() for n in _NOUNS.split()]


@dataclass(frozen=True)
class Needle:
    """tokens [L]: prompt and answer; labels are at the answer's places."""

    tokens: list[int]
    answer: int  # its last tokens
    text: str  # of the needle
    value: str


@dataclass(frozen=True)
class _Words:
    """What a text has besides its haystack."""

    frame: str
    needle: str
    value: str
    first: list[int]  # tokens of the frame
    question: list[int]
    answer: list[int]
    room: int  # tokens left for haystack and needle


class NeedleTask:
    """Texts of exactly `length` tokens with the needle at a depth of 0 (start) to 1 (end) of the haystack."""

    def __init__(self, kind: str, tokenizer: Encoder, haystack: str | None = None, seed: int = 0) -> None:
        """haystack: text of any length, repeated as needed; for all kinds but passkey. UserError without one."""
        if kind not in KINDS:
            raise UserError(f"there is no needle {kind!r}; choose of {', '.join(KINDS)}")
        if kind != "passkey" and not (haystack or "").strip():
            raise UserError(f"needles of kind {kind} are hidden in a text: give --haystack FILE")
        self.kind, self.tokenizer, self.seed = kind, tokenizer, seed
        texts = sentences(haystack or "")
        if kind == "passkey":  # each repeat on a line of its own, as in RULER
            texts = sentences(NOISE)
            texts[0], texts[-1] = texts[0].lstrip(), f"{texts[-1]}\n"
        self.hay = Haystack(tokenizer, texts)

    def sample(self, length: int, depths: Sequence[float], numbers: Sequence[int]) -> Sample:
        """Texts `numbers`, number n at depth depths[n % len(depths)]: tokens and labels [n, length - 1]."""
        rows = [self.needle(length, depths[n % len(depths)], n) for n in numbers]
        tokens = torch.tensor([row.tokens for row in rows])
        labels = tokens[:, 1:].clone()
        for row, needle in zip(labels, rows, strict=True):
            row[: length - 1 - needle.answer] = IGNORE
        return Sample(tokens[:, :-1], labels, None)

    def check(self, length: int, count: int) -> None:
        """UserError where so few tokens do not hold needle and question of one of the texts 0 to count - 1."""
        for number in range(count):
            self._words(length, self._draw(length, number))

    def needle(self, length: int, depth: float, number: int) -> Needle:
        """UserError where so few tokens do not hold needle and question."""
        draw = self._draw(length, number)
        words = self._words(length, draw)
        start = 0 if self.kind == "passkey" else draw.randrange(len(self.hay.texts))
        middle = self.hay.around(words.frame, words.needle, words.room, depth, start)
        tokens = [*words.first, *middle, *words.question, *words.answer]
        return Needle(tokens, len(words.answer), words.needle, words.value)

    def _draw(self, length: int, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.kind}/{length}/{number}")

    def _words(self, length: int, draw: random.Random) -> _Words:
        key, value = draw.choice(WORDS), self._value(draw)
        while value == key:
            value = self._value(draw)
        names = {"one": {"passkey": "number"}.get(self.kind, self.kind), "key": key, "value": value}
        frame, needle, question = (text.format(**names) for text in (FRAME, NEEDLE, QUESTION))
        first = encode(self.tokenizer, frame).tolist()
        asked = behind(self.tokenizer, needle, question).tolist()
        answer = behind(self.tokenizer, question, f" {value}").tolist()
        room = length - len(first) - len(asked) - len(answer)
        free = room - len(behind(self.tokenizer, frame, needle))
        if free < 0:
            raise UserError(
                f"a needle of kind {self.kind} and its question take {length - free} tokens of this tokenizer, but "
                f"texts of {length} are wanted; use longer ones"
            )
        return _Words(frame, needle, value, first, asked, answer, room)

    def _value(self, draw: random.Random) -> str:
        if self.kind == "uuid":
            return str(uuid.UUID(int=draw.getrandbits(128), version=4))
        return draw.choice(WORDS) if self.kind == "word" else str(draw.randrange(10**6, 10**7))
