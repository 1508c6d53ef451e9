"""Figures as benchmarks write them: JSON of what they are about, and metrics by case.

    {"about": {command, date, device, dtype, threads, versions: {name: version}, ...},
     "cases": {name: {metric: number, ..., "rounds": [{metric: number, ...}, ...]}}}

No name of a host and no path of the machine is in it: of absolute paths in the command only the last part.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from titans_train import __version__
from titans_train.errors import UserError
from titans_train.untrusted import parse_json, read_bounded

LIBRARIES = ("torch", "triton", "deepspeed", "titans-pytorch", "fla-core")
LARGEST = 64 << 20  # bytes of a file that is read
Cases = dict[str, dict[str, Any]]


def about(verb: str, argv: Sequence[str], device: str, dtype: str, **more: Any) -> dict[str, Any]:
    """What figures are about that were measured on this machine.

    device: cpu (one thread is taken of it) or cuda; dtype: of the model; more: further keys, or others' values.
    """
    return {
        "command": command(verb, argv),
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "dtype": dtype,
        "threads": 1 if device == "cpu" else torch.get_num_threads(),
        "versions": versions(),
        **more,
    }


def command(verb: str, argv: Sequence[str]) -> str:
    """The command line that repeats it."""
    return shlex.join(["python", "-m", "titans_train", "benchmark", verb, *map(_without_folder, argv)])


def _without_folder(argument: str) -> str:
    """Also of key=/path."""
    key, equals, value = argument.rpartition("=")
    path = Path(value)
    return key + equals + path.name if path.is_absolute() or ".." in path.parts else argument


def device_name(device: str) -> str:
    """Of the GPU; or of the CPU, as far as the system tells it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in names if name), platform.processor() or platform.machine())


def versions() -> dict[str, str]:
    """Of Python, of this and of the libraries that are installed."""
    found = {"python": platform.python_version(), "titans-train": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, about: Mapping[str, Any], cases: Mapping[str, Mapping[str, Any]]) -> None:
    path.write_text(json.dumps({"about": about, "cases": cases}, indent=1) + "\n")


def read(path: Path) -> tuple[dict[str, Any], Cases]:
    """What it is about, and the cases. UserError: there is no such file, or it is none that `write` wrote."""
    remedy = "name a file that `benchmark ... --json` wrote"
    try:
        found = parse_json(read_bounded(path, LARGEST))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; {remedy}") from error
    cases = found.get("cases") if isinstance(found, dict) else None
    if not isinstance(cases, dict) or not all(isinstance(metrics, dict) for metrics in cases.values()):
        raise UserError(f'{path} has no metrics by case under "cases"; {remedy}')
    what = found.get("about", {})
    return what if isinstance(what, dict) else {"about": what}, cases
