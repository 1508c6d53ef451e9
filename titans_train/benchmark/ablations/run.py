"""One run: trains with the verb `train`, as a user would, then evaluates; what is done is not done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from titans_train.benchmark.ablations.variants import Run, count
from titans_train.config import RunConfig, dump_config

Result = dict[str, Any]
TIMES = (1, 4, 16, 64)  # of the training length, at which needles are looked for


class Failed(Exception):  # noqa: N818
    """A run that did not end well, with the last lines of what it said."""


def run_one(run: Run, config: RunConfig, folder: Path, cases: int) -> Result:
    """Trains in folder/NAME and evaluates into folder/NAME.json, unless that is done, with the same config and cases.

    Result: task, variant, seed, parameters, config, cases, figures, torch, and cpu_seconds of training and evaluation
    over all attempts. Failed: a step of it did, or the folder has a run of other settings.
    """
    path, asked = folder / f"{run.name}.json", {"config": config.model_dump(mode="json"), "cases": cases}
    if (done := finished(path, asked)) is not None:
        return done
    file, text = folder / f"{run.name}.yaml", dump_config(config)
    if (folder / run.name).exists() and file.exists() and file.read_text("utf-8") != text:
        raise Failed(f"{folder / run.name} has a run with other settings; remove it, or give another --folder")
    file.write_text(text, "utf-8")
    log = folder / f"{run.name}.log"
    _verb(log, "train", str(file))
    figures = _figures(log, file, run.task, config, cases)
    import torch

    result = {
        "task": run.task, "variant": run.variant.name, "seed": run.seed, "parameters": count(config),
        "figures": figures, "cpu_seconds": round(_seconds(log)), "torch": torch.__version__, **asked,
    }  # fmt: skip
    path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".partial").replace(path)
    return result


def finished(path: Path, asked: dict[str, Any]) -> Result | None:
    try:
        found: Result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and all(found.get(name) == value for name, value in asked.items())
    return found if same else None


def _figures(log: Path, file: Path, task: str, config: RunConfig, cases: int) -> dict[str, Any]:
    out = file.with_suffix(".figures")
    _verb(log, "evaluate", str(file), "--sequences", "256", "--json", str(out))
    found = json.loads(out.read_text())
    wanted = ("loss", "accuracy", "tokens", "by_position", "bits_per_byte")
    figures = {name: found[name] for name in wanted if name in found}
    if task == "needles":
        lengths = [str(n * config.training.sequence_length) for n in TIMES]
        options = ("--lengths", *lengths, "--depths", "5", "--cases", str(cases), "--json", str(out))
        _verb(log, "evaluate", str(file), "--task", "needles", *options)
        found = json.loads(out.read_text())
        figures |= {"needles": found["needles"]["tokens"], "by_depth": found["by_depth"]["tokens"]}
    out.unlink()
    return figures


def _verb(log: Path, *words: str) -> None:
    """`python -m titans_train ...` in one process with one thread; its CPU seconds go beside the log. Failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:
        command = [sys.executable, "-m", "titans_train", *words]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    with _seconds_file(log).open("a") as file_of_seconds:
        file_of_seconds.write(f"{usage.ru_utime + usage.ru_stime}\n")
    if process.returncode:
        last = log.read_text("utf-8", "replace").splitlines()[-5:]
        raise Failed(f"{' '.join(words[:2])} ended with status {process.returncode}: " + "\n".join(last))


def _seconds_file(log: Path) -> Path:
    return log.with_suffix(".seconds")


def _seconds(log: Path) -> float:
    return sum(map(float, _seconds_file(log).read_text().split()))
