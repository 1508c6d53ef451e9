"""Tasks of BABILong's kind: bAbI's worlds (arXiv 1502.05698), their facts in order among the sentences of a text.

Persons move between places; they pick objects up and drop them.

    qa1   where is a person?                                   one supporting fact: the last move
    qa2   where is an object?                                  two: who took or dropped it, and where
    qa3   where was an object before it came to a place?       three

    python -m titans_train.evaluation.babilong_make --out FOLDER --haystack FILE --task qa1 --lengths 1k 2k

writes FOLDER/qa1/1k.jsonl and so on, as titans_train/evaluation/babilong.py reads them. Texts have at most so many
tokens (k: 1,000), without prompt and question; of length 0k are those of the facts alone.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.errors import PrepareError
from data_prep.tokenizer import load_tokenizer
from titans_train.errors import UserError
from titans_train.evaluation.babilong import length_of
from titans_train.evaluation.encoding import Encoder
from titans_train.untrusted import read_bounded

PERSONS = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
MOVES = ("went to", "moved to", "travelled to", "journeyed to", "went back to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
FACTS = {"qa1": (2, 10), "qa2": (4, 20), "qa3": (8, 32)}  # fewest and most of a story
LARGEST_HAYSTACK = 1 << 30  # bytes
_NAMED = re.compile(rf"\b({'|'.join(PERSONS)})\b")


@dataclass
class World:
    """Who is where and holds what, and where each object has been since it was first taken."""

    places: dict[str, str] = field(default_factory=dict)  # of persons
    holders: dict[str, str] = field(default_factory=dict)  # of objects that are held
    been: dict[str, list[str]] = field(default_factory=dict)  # of objects, without repeats in a row

    def move(self, person: str, place: str) -> None:
        self.places[person] = place
        for thing, holder in self.holders.items():
            if holder == person:
                self._at(thing, place)

    def take(self, person: str, thing: str) -> None:
        self.holders[thing] = person
        self._at(thing, self.places[person])

    def drop(self, thing: str) -> None:
        del self.holders[thing]

    def takeable(self, person: str) -> list[str]:
        """By a person whose place is known: what lies there, or has never been seen."""
        here = self.places[person]
        return [t for t in OBJECTS if t not in self.holders and self.been.get(t, [here])[-1] == here]

    def _at(self, thing: str, place: str) -> None:
        been = self.been.setdefault(thing, [])
        if not been or been[-1] != place:
            been.append(place)


@dataclass(frozen=True)
class Story:
    facts: list[str]
    question: str
    target: str


def story(task: str, draw: random.Random) -> Story:
    """Facts until there is something to ask; at least and at most as many as FACTS says."""
    fewest, most = FACTS[task]
    while True:
        world, wanted = World(), draw.randint(fewest, most)
        facts = [_event(world, task, draw) for _ in range(wanted)]
        if asked := _ask(task, world, draw):
            return Story(facts, *asked)


def _event(world: World, task: str, draw: random.Random) -> str:
    person = draw.choice(PERSONS)
    if task != "qa1" and person in world.places and draw.random() < 0.5:
        held = [thing for thing, holder in world.holders.items() if holder == person]
        free = world.takeable(person)
        if free and (not held or draw.random() < 0.5):
            thing = draw.choice(free)
            world.take(person, thing)
            return f"{person} {draw.choice(TAKES)} the {thing} there."
        if held:
            thing = draw.choice(held)
            world.drop(thing)
            return f"{person} {draw.choice(DROPS)} the {thing}."
    place = draw.choice([p for p in PLACES if p != world.places.get(person)])
    world.move(person, place)
    return f"{person} {draw.choice(MOVES)} the {place}."


def _ask(task: str, world: World, draw: random.Random) -> tuple[str, str] | None:
    if task == "qa1":
        person = draw.choice(sorted(world.places))
        return f"Where is {person}?", world.places[person]
    known = sorted(thing for thing, been in world.been.items() if len(been) >= (2 if task == "qa3" else 1))
    if not known:
        return None
    thing = draw.choice(known)
    been = world.been[thing]
    if task == "qa2":
        return f"Where is the {thing}?", been[-1]
    return f"Where was the {thing} before the {been[-1]}?", been[-2]


class Maker:
    """Records of one task; number n of a length is the same whenever it is made with the same seed and haystack."""

    def __init__(self, task: str, tokenizer: Encoder, haystack: str, seed: int = 0) -> None:
        """haystack: its sentences that name one of PERSONS are left out. UserError where none remain."""
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        found = re.split(r"(?<=[.!?])\s+", " ".join(haystack.split()))
        self.sentences = [s for s in found if s and not _NAMED.search(s)]
        if not self.sentences:
            raise UserError(f"the haystack has no sentence that names none of {', '.join(PERSONS)}; give another text")
        self.sizes = [len(tokens) for tokens in tokenizer.encode([f" {s}" for s in self.sentences])]

    def record(self, length: int, number: int) -> dict[str, str]:
        """input: at most `length` tokens, less than a sentence short; 0: facts alone. UserError: they are more."""
        draw, made, room = self.begun(length, number)
        text = _scattered(made.facts, self._hay(room, draw), draw)
        return {"input": text, "question": made.question, "target": made.target}

    def begun(self, length: int, number: int) -> tuple[random.Random, Story, int]:
        """Random numbers, story, and how many tokens are left for the haystack."""
        draw = random.Random(f"{self.seed}/{self.task}/{length}/{number}")
        made = story(self.task, draw)
        size = sum(len(tokens) for tokens in self.tokenizer.encode([f" {fact}" for fact in made.facts]))
        if 0 < length < size:
            raise UserError(
                f"the {len(made.facts)} facts of a story of {self.task} take {size:,} tokens of this tokenizer, but "
                f"texts of {length:,} are wanted; use longer ones, or 0k for facts alone"
            )
        return draw, made, max(length - size, 0)

    def _hay(self, room: int, draw: random.Random) -> list[str]:
        at, hay = draw.randrange(len(self.sentences)), []
        while (size := self.sizes[at % len(self.sizes)]) <= room:
            hay.append(self.sentences[at % len(self.sizes)])
            room -= size
            at += 1
        return hay


def _scattered(facts: list[str], hay: list[str], draw: random.Random) -> str:
    """Each fact before a sentence drawn at random, or behind the last, all in their order."""
    places = sorted(draw.randint(0, len(hay)) for _ in facts)
    parts, done = [], 0
    for place, fact in zip(places, facts, strict=True):
        parts += [*hay[done:place], fact]
        done = place
    return " ".join([*parts, *hay[done:]])


def write(maker: Maker, folder: Path, name: str, count: int) -> Path:
    """`count` records of the length `name` to FOLDER/<task>/<name>.jsonl, which is whole or not there. UserError."""
    length = length_of(name)
    assert length is not None
    path = folder / maker.task / f"{name}.jsonl"
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for n in range(count):
                file.write(json.dumps(maker.record(length, n), ensure_ascii=False) + "\n")
        return partial.replace(path)
    except OSError as error:
        raise UserError(f"--out {folder}: {path} cannot be written: {error.strerror}; give another folder") from error


def _options(args: Sequence[str] | None) -> Any:
    parser = argparse.ArgumentParser(
        prog="python -m titans_train.evaluation.babilong_make", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--haystack", type=Path, required=True, metavar="FILE", help="UTF-8 text with sentences")
    parser.add_argument("--task", choices=FACTS, default="qa1")
    parser.add_argument("--lengths", nargs="+", default=["1k"], metavar="Nk", help="tokens of a text, as 0k 4k 1M")
    parser.add_argument("--count", type=int, default=100, help="texts of each length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="bytes", help="bytes, a tokenizer.json or a .model file, or its folder")
    return parser.parse_args(args)


def make(options: Any) -> list[Path]:
    """The files written. UserError, before any is."""
    if options.count < 1:
        raise UserError(f"--count is {options.count}; it is at least 1")
    if unknown := [name for name in options.lengths if length_of(name) is None]:
        raise UserError(f"--lengths has {unknown[0]!r}; write as 0k, 512, 4k or 1M")
    try:
        haystack = read_bounded(options.haystack, LARGEST_HAYSTACK).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {options.haystack} cannot be read as UTF-8 text: {error}") from error
    try:
        tokenizer = load_tokenizer(options.tokenizer)
    except PrepareError as error:
        raise UserError(str(error)) from error
    maker = Maker(options.task, tokenizer, haystack, options.seed)
    lengths = list(dict.fromkeys(options.lengths))
    for name in lengths:
        for n in range(options.count):
            maker.begun(length_of(name) or 0, n)
    return [write(maker, options.out, name, options.count) for name in lengths]


def main(args: Sequence[str] | None = None) -> int:
    try:
        for path in make(_options(args)):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
