"""What is wrong with a config, in a form that people read and tests compare."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from titans_train.errors import UserError


@dataclass(frozen=True)
class Problem:
    path: str  # of the key: "model.heads"; empty if the whole file is meant
    message: str  # names the value and the limit
    suggestion: str = ""  # what to write instead
    where: str = ""  # "configs/x.yaml:7" or "command line"

    def __str__(self) -> str:
        place = f" ({self.where})" if self.where else ""
        remedy = f"\n      -> {self.suggestion}" if self.suggestion else ""
        return f"{self.path}{place}: {self.message}{remedy}" if self.path or place else f"{self.message}{remedy}"


class ConfigError(UserError):
    """A refused config. `problems` holds every one; str() lists them."""

    def __init__(self, problems: Sequence[Problem], subject: str = "the config") -> None:
        self.problems = list(problems)
        self.subject = subject
        super().__init__(subject)

    def __str__(self) -> str:
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        return "\n".join([f"{self.subject} is refused, {count}:", *(f"  - {p}" for p in self.problems)])


def show(value: object, limit: int = 60) -> str:
    """A value as it may stand in a message: strings in quotes, long ones cut."""
    names = {True: "true", False: "false", None: "null"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like `word`, or None if none is. Swapped letters beat other letters."""

    def likeness(choice: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, word, choice).ratio(), sorted(word) == sorted(choice)

    best = max(choices, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] >= 0.6 else None


def nearest_divisors(number: int, value: int, multiple_of: int = 1) -> list[int]:
    """The divisors of `number` next to `value` from below and above; they leave a multiple of `multiple_of`."""
    divisors = [n for n in range(1, number + 1) if number % n == 0 and (number // n) % multiple_of == 0]
    below, above = [n for n in divisors if n <= value], [n for n in divisors if n > value]
    return below[-1:] + above[:1]


def nearest_multiples(step: int, value: int) -> list[int]:
    """The positive multiples of `step` next to `value` from below and above."""
    below = value // step * step
    return [n for n in (below, below + step) if n > 0]


def use(name: str, values: Sequence[object]) -> str:
    """'use 4 or 8 for model.heads'"""
    return f"use {' or '.join(str(v) for v in values)} for {name}" if values else ""
