"""Tasks of EleutherAI's evaluation harness (lm_eval), by their names there, with the harness's own metrics.

"paper" stands for those of Titans' paper: WikiText, LAMBADA, and the common-sense tasks. Nothing is downloaded: their
data must be in the cache of Hugging Face's `datasets` on this machine, or a task of your own names a local file.
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titans_train.errors import UserError
from titans_train.evaluation.context import Context

PAPER = (
    "wikitext", "lambada_openai", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "social_iqa", "boolq",
)  # fmt: skip
RESAMPLED = 1000  # times, for the standard error of metrics that have no formula for it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", default="paper", help="names with commas between; default: paper")
    parser.add_argument(
        "--include-path", type=Path, metavar="FOLDER",
        help="with YAML files of further tasks; they may name Python functions, which are run: only of those you trust",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each task, for a quick look")
    parser.add_argument("--fewshot", type=int, metavar="N", help="solved examples before each (default: the task's)")


def run(context: Context, options: argparse.Namespace) -> dict[str, Any]:
    names = names_of(options.tasks)
    check(context, options)
    with offline():
        try:
            import lm_eval
            from lm_eval.evaluator import simple_evaluate

            from titans_train.evaluation.harness import HarnessModel
        except ImportError as error:
            raise UserError(f"--task harness needs lm_eval ({error}): pip install 'titans-train[harness]'") from error
        model = HarnessModel(context.scorer, context.tokenizer)
        manager = manager_of(names, options.include_path)
        tasks = load(names, manager)
        found = simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, num_fewshot=options.fewshot, limit=options.limit,
            bootstrap_iters=RESAMPLED, log_samples=False,
        )  # fmt: skip
    assert found is not None
    figures = {name: figures_of(name, found) for name in found["results"]}
    for name, row in figures.items():
        for metric, value in row.items():
            if isinstance(value, float) and not metric.endswith("_stderr"):
                spread = row.get(f"{metric}_stderr")
                more = f" ± {spread:.4f}" if isinstance(spread, float) else ""
                context.say(f"  {name:20} {metric:18} {value:>12.4f}{more}")
    settings = {"limit": options.limit, "fewshot": options.fewshot, "lm_eval": lm_eval.__version__}
    return {"settings": settings, "harness": figures}


def names_of(text: str) -> list[str]:
    """ "paper" stands for PAPER. UserError: there is none."""
    given = [name.strip() for name in text.split(",") if name.strip()]
    names = [name for part in given for name in (PAPER if part == "paper" else (part,))]
    if not names:
        raise UserError("--tasks names no task; give names of lm_eval with commas between, or paper")
    return list(dict.fromkeys(names))


def check(context: Context, options: argparse.Namespace) -> None:
    if (processes := context.mesh.world_size) > 1:
        raise UserError(f"--task harness runs on one process, not on {processes}; start it without torchrun")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; it is at least 1")
    if options.fewshot is not None and options.fewshot < 0:
        raise UserError(f"--fewshot is {options.fewshot}; it is at least 0")
    if options.include_path and not options.include_path.is_dir():
        raise UserError(f"--include-path {options.include_path}: there is no such folder")


@contextmanager
def offline() -> Iterator[None]:
    """Within, `datasets` and the hub's client reach for no network, whenever they are or were imported."""
    names = ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        with _switched():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _switched() -> Iterator[None]:
    """They read the environment once, when they are imported, which may have been before."""
    try:
        from datasets import config
        from huggingface_hub import constants
    except ImportError:  # told by who needs them
        yield
        return
    modules: tuple[Any, ...] = (config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def manager_of(names: list[str], folder: Path | None) -> Any:
    """lm_eval's index of tasks: those of a folder if it has all that are wanted, else also the thousands of its own."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=folder)
    return manager


def load(names: list[str], manager: Any) -> list[Any]:
    """Tasks and groups with their data. UserError: a task is not there, or data are not, all of them named."""
    tasks: list[Any] = []
    missing: dict[str, str] = {}
    for name in names:
        if name not in manager.task_index:
            similar = difflib.get_close_matches(name, manager.task_index, 3)
            hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
            raise UserError(f"lm_eval has no task {name[:80]!r}{hint}. Its tasks: lm-eval ls tasks")
        try:
            found = manager.load([name])
        except Exception as error:  # a task's YAML, its functions, the reader of its data: anything may come
            config = manager.task_index[name].cfg or {}
            if not isinstance(error, OSError) or not config.get("dataset_path") or config.get("dataset_kwargs"):
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise UserError(
                    f"the task {name} cannot be loaded ({problem}); look at its YAML file and its data"
                ) from error
            where = (config["dataset_path"], config.get("dataset_name"))
            missing[name] = ", ".join(repr(part) for part in where if part)
        else:
            groups = found.get("groups", {})
            tasks += [groups[name]] if name in groups else found["tasks"].values()
    if missing:
        raise UserError(_remedy(missing))
    return tasks


def _remedy(missing: dict[str, str]) -> str:
    """missing: task -> what `load_dataset` takes."""
    each = "; ".join(f"{name} ({what})" for name, what in missing.items())
    calls = "; ".join(f"load_dataset({what})" for what in dict.fromkeys(missing.values()))
    return (
        f"the data of these tasks, of the Hugging Face hub, are not on this machine: {each}.\n"
        f'Where there is a network: HF_HOME=FOLDER python -c "from datasets import load_dataset; {calls}"\n'
        "Then bring FOLDER here and set HF_HOME to it. Or choose other --tasks."
    )


def figures_of(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """{metric: value, metric_stderr: value, samples: number}; a metric's filter is part of its name, if it has one."""
    figures: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        metric, _, chosen = key.partition(",")  # acc,none and acc_stderr,none
        if isinstance(value, (int, float)) and chosen:
            error = "_stderr" if metric.endswith("_stderr") else ""
            figures[metric.removesuffix(error) + ("" if chosen == "none" else f" ({chosen})") + error] = float(value)
    return figures | {"samples": found["n-samples"].get(name, {}).get("effective")}
