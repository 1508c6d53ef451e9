"""BABILong (arXiv 2406.10149): bAbI's facts scattered in long texts, and a question on them. Reader and accuracy.

Its files lie in a local folder as FOLDER/<task>/<length>.json or FOLDER/<length>/<task>.json (or .jsonl): qa1/4k.json
as in the published data set. A file is a list of records, or one record after the other:

    {"input": the text, "question": ..., "target": the answer}

A file is never held whole: what is kept is where its records lie. An answer is right if the likeliest token is the
right one at each of its places.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from titans_train.errors import UserError
from titans_train.evaluation.babilong_prompts import around
from titans_train.evaluation.cases import Case, padded
from titans_train.evaluation.encoding import Encoder, behind, encode, pieces
from titans_train.evaluation.intervals import wilson
from titans_train.evaluation.scoring import Scorer, case_sums
from titans_train.untrusted import parse_json

FIELDS = ("input", "question", "target")
LARGEST_RECORD = 128 << 20  # bytes; one of 10M tokens of English takes about 45 MB
BLOCK = 1 << 20  # bytes read at once
PIECE = 1 << 20  # characters given to the tokenizer at once
_BOM = codecs.BOM_UTF8.decode("latin-1")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class TaskFile:
    task: str
    length: str
    path: Path
    first: int | None = None  # only so many records of it

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """First byte and end of each record. UserError for the first bad one, by its number."""
        found = []
        try:
            if not self.path.is_file():
                raise UserError(f"{self.path} is no regular file; give BABILong's JSON files")
            for place in _places(self.path):
                found.append(place)
                self._read(place, len(found))
                if len(found) == self.first:
                    break
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        if not found:
            raise UserError(f"{self.path} holds no record; give BABILong's JSON files")
        return found

    def record(self, n: int) -> dict[str, str]:
        """The n-th record from 0, with FIELDS."""
        return self._read(self.places[n], n + 1)

    def _read(self, place: tuple[int, int], number: int) -> dict[str, str]:
        with self.path.open("rb") as file:
            file.seek(place[0])
            content = file.read(place[1] - place[0])
        try:
            record = parse_json(content)
            for name in FIELDS:
                text = record.get(name)
                if not isinstance(text, str) or not (text.strip() or name == "input"):
                    raise ValueError(f"its {name!r} is {'missing' if text is None else 'no text'}")
                text.encode("utf-8")  # half a surrogate pair can be written in JSON
        except ValueError as error:
            raise _bad(self.path, number, error) from error
        return {name: record[name] for name in FIELDS}


def _bad(path: Path, number: int, problem: object) -> UserError:
    want = ", ".join(FIELDS)
    return UserError(f"{path}: record {number} is none of BABILong's: {problem}; it has {want}, each a text")


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """Where records begin and end, in a list or one after the other. UserError where the text between is no JSON."""
    window = _Window(path)
    number = 0
    with window.file:
        if (begin := window.next()) == _BOM[0]:
            raise _bad(path, 1, "the file begins with a byte order mark; save it as UTF-8 without one")
        listed = begin == "["
        window.at += listed
        while (char := window.next()) != ("]" if listed else ""):
            if listed and number:
                if char != ",":
                    raise _bad(path, number + 1, "there is no comma before it, or the list does not end")
                window.at += 1
                char = window.next()
            if char != "{":
                raise _bad(path, number + 1, "it does not begin with {")
            number += 1
            yield window.record(number)
        window.at += listed
        if listed and window.next():
            raise UserError(f"{path}: something follows the end of its list; give a list of records, or records alone")


class _Window:
    """A file read block by block, as latin-1: one character is one byte, and JSON's structure is ASCII."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.text, self.base, self.at = "", 0, 0  # base: of text in the file

    def more(self) -> bool:
        rest = self.text[self.at :]
        block = self.file.read(max(BLOCK, len(rest)))  # doubled, so that a long record is not parsed too often
        self.base, self.at, self.text = self.base + self.at, 0, rest + block.decode("latin-1")
        return bool(block)

    def next(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found is not None
            self.at = found.end()
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def record(self, number: int) -> tuple[int, int]:
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.at)
                begin, self.at = self.base + self.at, end
                return begin, self.base + end
            except RecursionError:
                raise _bad(self.path, number, "it is nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if cut and len(self.text) - self.at > LARGEST_RECORD:
                    raise _bad(self.path, number, f"it is larger than {LARGEST_RECORD:,} bytes") from error
                if not cut or not self.more():
                    raise _bad(self.path, number, f"it is no JSON ({error.msg})") from error
            except ValueError as error:  # Python reads no integer of more than 4300 digits
                raise _bad(self.path, number, "one of its numbers has thousands of digits") from error


_DECODER = json.JSONDecoder()


def find_files(
    folder: Path, tasks: Sequence[str] = (), lengths: Sequence[str] = (), first: int | None = None
) -> list[TaskFile]:
    """Of these tasks and lengths (empty: all there are), each once, by length. UserError: one that is asked for is not
    there, for any task or length or, where both are given, for each.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give one with BABILong's files as qa1/4k.json")
    for name in [*(t for t in tasks if not is_task(t)), *(n for n in lengths if length_of(n) is None)]:
        raise UserError(f"{name[:40]!r} names no task or length; tasks are qa1 to qa20, lengths as 0k, 4k or 1M")
    found: dict[tuple[str, str], Path] = {}
    for path in sorted([*folder.glob("*/*.json"), *folder.glob("*/*.jsonl")]):
        names = path.parent.name, path.stem
        task, length = names if is_task(names[0]) else names[::-1]
        if is_task(task) and length_of(length) is not None:
            other = found.setdefault((task, length), path)
            if other != path:
                raise UserError(f"{other} and {path} are both {task} at {length}; keep one of them")
    wanted = [(t, n) for n in dict.fromkeys(lengths) for t in dict.fromkeys(tasks)]
    wanted = wanted or [(t, "") for t in tasks] or [("", n) for n in lengths] or [("", "")]
    if missing := [(t, n) for t, n in wanted if not any(t in (a, "") and n in (b, "") for a, b in found)]:
        lacking = ", ".join(f"{task or 'any task'}/{length or 'any length'}" for task, length in missing)
        there = ", ".join(f"{task}/{length}" for task, length in found) or "nothing"
        raise UserError(f"{folder} has no file for {lacking}; it has {there}. Choose --tasks and --lengths")
    tasks = list(dict.fromkeys(tasks)) or sorted({task for task, _ in found}, key=lambda task: int(task[2:]))
    lengths = list(dict.fromkeys(lengths)) or sorted({length for _, length in found}, key=lambda n: length_of(n) or 0)
    pairs = [(task, length) for length in lengths for task in tasks if (task, length) in found]
    return [TaskFile(task, length, found[task, length], first) for task, length in pairs]


def is_task(name: str) -> bool:
    return re.fullmatch(r"qa[1-9][0-9]?", name) is not None


def length_of(name: str) -> int | None:
    """Tokens that a length's name says, as 4k or 1M; None where it is no such name."""
    found = re.fullmatch(r"([0-9]{1,9})([kKM]?)", name)
    return int(found[1]) * {"": 1, "M": 10**6}.get(found[2], 1000) if found else None


def tokens_of(tokenizer: Encoder, task: str, record: dict[str, str], style: str) -> Case:
    """Prompt and answer [L], and how many of the last tokens are the answer.

    The answer is encoded behind the question, as it would be written.
    """
    before, after = around(task, record["question"], style)
    answer = " " + record["target"].strip()
    parts = pieces(before + record["input"].strip() + after, PIECE)
    asked = behind(tokenizer, parts[-1], answer)
    return np.concatenate([*(encode(tokenizer, text) for text in parts), asked]), len(asked)


def evaluate(scorer: Scorer, file: TaskFile, tokenizer: Encoder, style: str = "original") -> dict[str, Any]:
    """task, length, samples, right, accuracy, its 95 % Wilson interval as low and high, loss (nats per token of the
    answer), tokens (of the first text). On every rank alike.
    """

    def case(n: int) -> Case:
        return tokens_of(tokenizer, file.task, file.record(n), style)

    count = len(file.places)
    sums = case_sums(scorer, count, lambda numbers: padded([case(n) for n in numbers]))
    right = int((sums[:, 0] == sums[:, 1]).sum())
    low, high = wilson(right, count)
    tokens, _, loss = sums.sum(0).tolist()
    return {
        "task": file.task, "length": file.length, "samples": count, "right": right, "accuracy": right / count,
        "low": low, "high": high, "loss": loss / tokens, "tokens": len(case(0)[0]),
    }  # fmt: skip
