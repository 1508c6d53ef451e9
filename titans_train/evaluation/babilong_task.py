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
    if options.picture and context.mesh.is_first:
        heat_map(rows, options.picture, f"{context.source.config.run.name}, step {context.about['step']}")
    return {"prompt": options.prompt, "results": rows}


def heat_map(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Tasks down, lengths across."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, lengths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "length"))
    by_place = {(row["task"], row["length"]): row["accuracy"] for row in rows}
    values = [[by_place[task, length] for length in lengths] for task in tasks]
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.8 * len(lengths), 1.8 + 0.45 * len(tasks)))
    image = axes.imshow(values, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="length of the text", ylabel="task", title=title)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, label="accuracy")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
