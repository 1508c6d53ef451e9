"""One run: trains with the verb `train`, as a user would, then evaluates; what is done is not done again."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from titans_train.benchmark.ablations.variants import Run, count
from titans_train.config import RunConfig, dump_config

Result = dict[str, Any]
TIMES = (1, 2, 4, 8)  # of the training length, at which needles are looked for


class Failed(Exception):  # noqa: N818
    """A run that did not end well, with the last lines of what it said."""


def run_one(run: Run, config: RunConfig, folder: Path, cases: int) -> Result:
    """Trains in folder/NAME and evaluates into folder/NAME.json, unless that is done, with the same config.

    Result: task, variant, seed, parameters, config, figures, cpu_seconds (of training and evaluation), versions.
    """
    path, settings = folder / f"{run.name}.json", config.model_dump(mode="json")
    if (done := finished(path, settings)) is not None:
        return done
    begun = time.monotonic()
    file = folder / f"{run.name}.yaml"
    file.write_text(dump_config(config), "utf-8")
    log = folder / f"{run.name}.log"
    seconds = _verb(log, "train", str(file))
    figures: dict[str, Any] = {}
    seconds += _evaluate(log, file, figures, run.task, config, cases)
    import torch

    result = {
        "task": run.task, "variant": run.variant.name, "seed": run.seed, "parameters": count(config),
        "figures": figures, "cpu_seconds": round(seconds), "wall_seconds": round(time.monotonic() - begun),
        "torch": torch.__version__, "config": settings,
    }  # fmt: skip
    path.with_suffix(".partial").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".partial").replace(path)
    return result


def finished(path: Path, settings: dict[str, Any]) -> Result | None:
    try:
        found: Result = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("config") == settings else None


def _evaluate(log: Path, file: Path, figures: dict[str, Any], task: str, config: RunConfig, cases: int) -> float:
    """Fills `figures`; CPU seconds."""
    out = file.with_suffix(".figures")
    seconds = _verb(log, "evaluate", str(file), "--sequences", "256", "--json", str(out))
    found = json.loads(out.read_text())
    figures |= {name: found[name] for name in ("loss", "accuracy", "by_position", "bits_per_byte") if name in found}
    if task == "needles":
        lengths = [str(n * config.training.sequence_length) for n in TIMES]
        options = ("--lengths", *lengths, "--depths", "5", "--cases", str(cases), "--json", str(out))
        seconds += _verb(log, "evaluate", str(file), "--task", "needles", *options)
        found = json.loads(out.read_text())
        figures |= {"needles": found["needles"]["tokens"], "by_depth": found["by_depth"]["tokens"]}
    out.unlink()
    return seconds


def _verb(log: Path, *words: str) -> float:
    """`python -m titans_train ...` in one process with one thread; CPU seconds. Failed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:
        command = [sys.executable, "-m", "titans_train", *words]
        status = subprocess.run(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL).returncode
    if status:
        last = log.read_text("utf-8", "replace").splitlines()[-5:]
        raise Failed(f"{' '.join(words[:2])} ended with status {status}: " + "\n".join(last))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
