"""Needles in haystacks by length and depth: RULER's single-needle tasks in text, or for a run on data.source needles
its own task at other lengths. Right is an answer whose every token is the likeliest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titans_train.data import Sample
from titans_train.data.needles import NeedlesTask
from titans_train.errors import UserError
from titans_train.evaluation.context import Context
from titans_train.evaluation.grid import Cells, Findable, depths_of, grid, heat_map, line, over_depths
from titans_train.evaluation.needles import KINDS, NeedleTask


class TokenNeedles:
    """The synthetic task of data/needles.py, its validation split, at any length and depth."""

    def __init__(self, task: NeedlesTask, seed: int, vocabulary: int) -> None:
        self.task, self.seed, self.vocabulary = task, seed, vocabulary

    def sample(self, length: int, depths: Sequence[float], numbers: Sequence[int]) -> Sample:
        self.check(length, len(numbers))
        key = (self.seed, self.task.tag, 1, length)
        drawn = [self.task.draw((*key, n), length, depths[n % len(depths)]) for n in numbers]
        tokens, labels = (torch.stack([torch.from_numpy(pair[part]) for pair in drawn]) for part in (0, 1))
        return Sample(tokens, labels, None)

    def check(self, length: int, count: int) -> None:
        if problem := self.task.problem(length, self.vocabulary):
            raise UserError(problem)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="tokens of a text")
    parser.add_argument("--depths", type=int, default=5, help="how many, from the start to the end of the haystack")
    parser.add_argument("--cases", type=int, default=20, help="texts for each length and depth")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="of needles in text (default: passkey)")
    parser.add_argument("--haystack", type=Path, help="UTF-8 text for all kinds but passkey")
    parser.add_argument("--seed", type=int, default=0)


def tasks_of(context: Context, options: argparse.Namespace) -> dict[str, Findable]:
    data = context.config.data
    if data.source == "needles":
        assert data.needles is not None
        for name in ("kinds", "haystack"):
            if getattr(options, name) is not None:
                raise UserError(
                    f"--{name} is for needles in text; this run's are tokens (data.source needles): leave it out"
                )
        vocabulary = context.model.shape.vocabulary
        return {"tokens": TokenNeedles(NeedlesTask(data.needles), options.seed, vocabulary)}
    haystack = None
    if options.haystack is not None:
        try:
            haystack = options.haystack.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--haystack {options.haystack} cannot be read as UTF-8 text: {error}") from error
    return {kind: NeedleTask(kind, context.tokenizer, haystack, options.seed) for kind in options.kinds or ["passkey"]}


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    if min(options.depths, options.cases, *options.lengths) < 1:
        raise UserError("--lengths, --depths and --cases are at least 1")
    options.lengths = list(dict.fromkeys(options.lengths))
    depths, tables = depths_of(options.depths), {}
    tasks = tasks_of(context, options)
    for task in tasks.values():
        for length in options.lengths:
            task.check(length, options.cases * len(depths))
    for name, task in tasks.items():
        context.say(f"{name}: {options.cases} texts at each of {len(depths)} depths")
        tables[name] = grid(
            context.scorer, task, options.lengths, depths, options.cases,
            lambda rows: context.say(line(over_depths(rows)[0])),
        )  # fmt: skip
    summary = {name: over_depths(rows) for name, rows in tables.items()}
    settings = {name: getattr(options, name) for name in ("lengths", "depths", "cases", "seed")}
    return {"settings": settings, "needles": summary, "by_depth": tables}


def draw(figures: dict[str, Any], path: Path, title: str) -> None:
    tables: dict[str, Cells] = {}
    for name, rows in figures["by_depth"].items():
        rows = sorted(rows, key=lambda r: (r["depth"], r["length"]))
        tables[name] = {(f"{100 * r['depth']:.3g}%", f"{r['length']:,}"): r["accuracy"] for r in rows}
    heat_map(tables, path, title, "depth of the needle", "tokens")
