"""The folder of a run: what it must agree with before it is touched, and what is written into it.

config.yaml plan.json plan.txt metrics.jsonl tensorboard/ checkpoints/ loss.png summary.json libraries.log
heartbeat.json; nonfinite/ and stacks/ (only where there was something to put there)
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data_prep.durable import TEMPORARY, whole_file
from titans_train.config import RunConfig, dump_config, load_config
from titans_train.errors import UserError
from titans_train.plan import Plan
from titans_train.untrusted import parse_json, read_bounded

# May change when a run goes on: how it is laid out, what it reports, how long it lasts, where its data lie. The batch
# size and the sources' weights may from the next step on; a checkpoint knows which data it has read (data/cursor.py).
FREE = {
    "parallel", "checkpoint", "monitoring", "run.folder", "run.name", "data.workers", "data.cache",
    "data.cache_limit_gib", "data.timeout_seconds", "data.remote_timeout_seconds", "data.path", "data.sources",
    "data.weights_from", "training.steps", "training.global_batch_size", "training.micro_batch_size",
    "training.activation_checkpointing", "training.skip_nonfinite", "evaluation", "memory.kernels",
    "memory.peer_kernels", "model.compile", "attention.kernels",
}  # fmt: skip


LOCK = ".lock"
OLD_LOCK_SECONDS = 120.0
LARGEST_RECORD = 1 << 24  # bytes of plan.json and summary.json
# There before a run is: reading alone fills the cache, and a start may end early.
BESIDE = {"cache", LOCK, "stacks", "libraries.log"}
WRITTEN = ("plan.json", "config.yaml", "plan.txt", "metrics.jsonl", "loss.png", "summary.json")  # whole, or not at all
OURS = ("plan.json", "config.yaml", "checkpoints")  # any of them: it is a run's folder


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in FREE:
            continue
        out |= _flat(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return out


def differences(old: dict[str, Any], config: RunConfig) -> list[str]:
    """Settings that may not change within a run, "key: old there, new here"."""
    a, b = _flat(old), _flat(config.model_dump(mode="json"))
    return [
        f"{key}: {a.get(key)} there, {b.get(key)} here"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def check(plan: Plan) -> None:
    """Refuses a folder of another run. Changes nothing."""
    folder = plan.run_directory
    if any((folder / name).exists() for name in OURS):
        theirs = _recorded(folder)
        differing = differences(theirs, plan.config)
        had, has = theirs["training"]["global_batch_size"], plan.config.training.global_batch_size
        if had != has and plan.config.training.carry_state:
            differing.append(f"training.global_batch_size: {had} there, {has} here, but its rows carry their state")
        if differing:
            raise UserError(
                f"{folder} holds a run with other settings:\n  - " + "\n  - ".join(differing)
                + "\nchoose another run.name, or set these back; nothing was changed"
            )  # fmt: skip
    elif folder.exists() and not all(path.name in BESIDE or _is_rest(path) for path in folder.iterdir()):
        raise UserError(f"{folder} is not empty and not a run (no plan.json); choose another run.name or run.folder")


def _is_rest(path: Path) -> bool:
    """Of a start that was killed while it wrote."""
    return path.name.endswith(TEMPORARY) and path.name.startswith(WRITTEN)


def _recorded(folder: Path) -> dict[str, Any]:
    """The settings of the run that is there, from plan.json or, where that is lost, from config.yaml."""
    plan, copy = folder / "plan.json", folder / "config.yaml"
    try:
        config: dict[str, Any] = parse_json(read_bounded(plan, LARGEST_RECORD))["config"]
        int(config["training"]["global_batch_size"])
        return config
    except (OSError, ValueError, KeyError, TypeError) as error:
        damage = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
    try:
        read_bounded(copy, LARGEST_RECORD)  # no pipe
        return load_config(copy).model_dump(mode="json")
    except (OSError, UserError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(
            f"{folder} holds a run, but {plan.name} {damage} and {copy.name} {reason}, so nothing says with which "
            f"settings; put the run's config there as {copy} (every checkpoint's manifest.json has it, as config), or "
            "choose another run.name; nothing was changed"
        ) from error


def own(plan: Plan, until: ExitStack) -> None:
    """The run's folder, made if need be, is this job's until the stack is left. UserError: it is another's.

    A start that SLURM made again waits for the last one's lock: a file server keeps that of a lost node for a while.
    """
    folder = plan.run_directory
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=OLD_LOCK_SECONDS if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0)
    except Timeout as error:
        raise UserError(f"another job trains in {folder}; wait until it ends, or choose another run.name") from error
    until.callback(lock.release)


def write(plan: Plan) -> None:
    """Config and plan into the run's folder. Each file is the old or the new one, whenever the process is killed."""
    folder = plan.run_directory
    texts = {
        "plan.json": json.dumps(plan.to_dict(), indent=1),
        "config.yaml": dump_config(plan.config),
        "plan.txt": plan.describe() + "\n",
    }
    for rest in filter(_is_rest, folder.iterdir()):
        rest.unlink(missing_ok=True)
    for name, text in texts.items():
        _write(folder / name, text)


def _write(path: Path, text: str) -> None:
    with whole_file(path) as stream:
        stream.write(text.encode("utf-8"))


def summarised_steps(plan: Plan) -> int | None:
    """The steps that summary.json is about; None where there is none that can be read."""
    try:
        steps = parse_json(read_bounded(plan.run_directory / "summary.json", LARGEST_RECORD))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def write_summary(plan: Plan, figures: dict[str, Any]) -> None:
    """UserError: the disk is full, and the like; a summary that was there is untouched."""
    versions = {name: version(name) for name in ("torch", "deepspeed", "mosaicml-streaming")}
    summary = {
        "run": plan.config.run.name, "block": plan.shape.block, "parameters": plan.parameter_count,
        "processes": plan.world_size, "machine": platform.machine(), "versions": versions, **figures,
    }  # fmt: skip
    path = plan.run_directory / "summary.json"
    try:
        _write(path, json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}). All steps are trained and saved: free space, and "
            "the same command makes the summary anew"
        ) from error
