"""The verb `evaluate`: one task on a checkpoint, in one process or on any layout (launchers/ranks.py)."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path

from titans_train.errors import UserError

# task: module beside this one, with add_arguments(parser) and run(context, options) -> figures
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
    parser.add_argument("--picture", type=Path, help="PNG file, where the task draws one")
    task.add_arguments(parser)
    options = parser.parse_intermixed_args(list(args))
    if options.batch is not None and options.batch < 1:
        raise UserError(f"--batch is {options.batch}; it is at least 1")
    for name in ("json", "picture"):
        path = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            raise UserError(f"--{name} {path}: there is no folder {path.parent}; create it")
    with opened(find(options.source, options.overrides, options.checkpoint), options.batch) as context:
        figures = task.run(context, options)
        if options.json and context.mesh.is_first:
            options.json.write_text(json.dumps({**context.about, **figures}, indent=1) + "\n")
    return 0
