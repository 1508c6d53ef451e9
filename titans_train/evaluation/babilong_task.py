"""BABILong: questions on facts that are scattered in long texts, by task and length, from files in a local folder.

The published ones are RMT-team/babilong of the Hugging Face hub; python -m titans_train.evaluation.babilong_make writes
ones of the same kind. Right is an answer whose every token is the likeliest.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from titans_train.errors import UserError
from titans_train.evaluation.babilong import evaluate, find_files
from titans_train.evaluation.babilong_prompts import STYLES
from titans_train.evaluation.context import Context
from titans_train.evaluation.grid import Cells, heat_map


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, required=True, help="with qa1/4k.json, or 4k/qa1.json, and so on")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="qaN", help="default: all in the folder")
    parser.add_argument("--lengths", nargs="+", default=[], metavar="Nk", help="as 0k 4k 1M; default: all there")
    parser.add_argument("--samples", type=int, help="the first so many of each file (default: all)")
    parser.add_argument(
        "--prompt", choices=STYLES, default=STYLES[0],
        help="original: the benchmark's instruction, examples and form of the answer (qa1 to qa5; a general one for "
        "others); bare: text and question alone, for models trained on the task",
    )  # fmt: skip


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    if options.samples is not None and options.samples < 1:
        raise UserError(f"--samples is {options.samples}; it is at least 1")
    files = find_files(options.folder, options.tasks, options.lengths, options.samples)
    for file in files:
        assert file.places  # reads it through: a bad record is told before hours of scoring
    context.say(f"  {'task':6} {'length':>7} {'tokens':>11} {'samples':>8} {'accuracy':>9}   95 % interval")
    rows = []
    for file in files:
        row = evaluate(context.scorer, file, context.tokenizer, options.prompt)
        context.say(
            f"  {row['task']:6} {row['length']:>7} {row['tokens']:>11,} {row['samples']:>8,} {row['accuracy']:>9.1%}   "
            f"{row['low']:.1%} to {row['high']:.1%}"
        )
        rows.append(row)
    return {"prompt": options.prompt, "results": rows}


def draw(figures: dict[str, Any], path: Path, title: str) -> None:
    """Tasks down, lengths across, empty where there is no file."""
    rows = figures["results"]
    tasks = list(dict.fromkeys(row["task"] for row in sorted(rows, key=lambda row: int(row["task"][2:]))))
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    by_place = {(row["task"], row["length"]): row["accuracy"] for row in rows}
    cells: Cells = {(task, length): by_place.get((task, length)) for task in tasks for length in lengths}
    heat_map({"": cells}, path, title, "task", "length of the text")
