"""The verb `evaluate`: one task on a checkpoint, in one process or on any layout (launchers/ranks.py)."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titans_train.errors import UserError
from titans_train.outputs import check_file

if TYPE_CHECKING:
    from titans_train.evaluation.context import Context

PICTURES = (".png", ".svg", ".pdf")
Draw = Callable[[dict[str, Any], Path, str], object]

# task: module beside this one, with add_arguments(parser), run(context, options) -> figures and, if its picture needs
# no more than these, draw(figures, path, title)
TASKS = {
    "perplexity": "perplexity_task",
    "stream": "streaming_task",
    "needles": "needles_task",
    "babilong": "babilong_task",
    "harness": "harness_task",
    "memory": "memory_task",
}


def main(args: Sequence[str]) -> int:
    from titans_train.evaluation.context import opened
    from titans_train.inference.source import find

    parser = argparse.ArgumentParser(prog="python -m titans_train evaluate", description=__doc__, add_help=False)
    parser.add_argument("--task", default="perplexity", choices=TASKS)
    chosen = parser.parse_known_args(list(args))[0].task
    task = importlib.import_module(f"titans_train.evaluation.{TASKS[chosen]}")
    parser = argparse.ArgumentParser(prog="python -m titans_train evaluate", description=task.__doc__)
    parser.add_argument("source", metavar="CONFIG.yaml|RUN|CHECKPOINT|EXPORT")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--task", default="perplexity", choices=TASKS, help="each has options of its own: --task X -h")
    parser.add_argument("--checkpoint", help="a checkpoint of the run, as step-00000100 (default: the newest)")
    parser.add_argument("--batch", type=int, help="sequences per forward (default: training.micro_batch_size)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file for a picture, where the task draws one: .png, .svg or .pdf")
    task.add_arguments(parser)
    options = parser.parse_intermixed_args(list(args))
    if options.batch is not None and options.batch < 1:
        raise UserError(f"--batch is {options.batch}; it is at least 1")
    check(options)
    with opened(find(options.source, options.overrides, options.checkpoint), options.batch) as context:
        figures = task.run(context, options)
        if context.mesh.is_first:
            write(context, options, figures, getattr(task, "draw", None))
    return 0


def check(options: argparse.Namespace) -> None:
    """UserError where the figures or the picture could not be written: known before anything is measured."""
    check_file("--json", options.json)
    check_file("--picture", options.picture)
    if options.picture and options.picture.suffix.lower() not in PICTURES:
        raise UserError(f"--picture {options.picture}: its name does not end with {', '.join(PICTURES)}")


def write(context: Context, options: argparse.Namespace, figures: dict[str, Any], draw: Draw | None) -> None:
    """The figures first: a picture that cannot be drawn does not lose them."""
    path = options.json
    try:
        if path:
            path.write_text(json.dumps({**context.about, **figures}, indent=1) + "\n")
        path = options.picture
        if path and draw:
            draw(figures, path, f"{context.source.config.run.name}, step {context.about['step']}")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}; the figures are printed above"
        ) from error
