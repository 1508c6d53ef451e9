"""The verb `inspect`: what is inside a checkpoint or an export. Needs no GPU; memory for one tensor at a time.

Exit status: 0; 1 where a file is damaged or a value is not finite; 2 where nothing can be said.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from titans_train.errors import UserError
from titans_train.inference.exported import Exported, is_export
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.checkpoint_folder import candidates
from titans_train.training.manifest import MANIFEST, DamagedCheckpoint, check_hashes, check_sizes, read_manifest

MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCK = 1 << 22  # elements looked at together


@dataclass(frozen=True)
class Figures:
    """Of a tensor's finite values; `nonfinite` counts the others."""

    norm: float
    min: float
    max: float
    mean_abs: float
    nonfinite: int


@dataclass(frozen=True)
class Row:
    """One parameter. `exp_avg`, `exp_avg_sq`: norms of Adam's moments. `problem`: why there are no figures."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: Figures | None = None
    exp_avg: float | None = None
    exp_avg_sq: float | None = None
    nonfinite: int = 0  # in the value and its moments
    problem: str | None = None


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train inspect", description=__doc__)
    parser.add_argument("path", type=Path, metavar="CHECKPOINT|RUN|EXPORT", help="of a run, its newest checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(list(args))
    stored = _open(options.path.expanduser())
    report = {**about(stored), "files": _files(stored)}
    if options.json:
        rows = list(rows_of(stored))
        print(json.dumps({**report, "parameters": [asdict(row) for row in rows]}, indent=1))
    else:
        rows = []
        for line in _head(report):
            print(line)
        print(_COLUMNS)
        for row in rows_of(stored):
            rows.append(row)
            print(_line(row), flush=True)
        print(_last_line(report, rows))
    sound = all(file["state"] == "ok" for file in report["files"].values())
    return 0 if sound and not any(row.problem or row.nonfinite for row in rows) else 1


def _open(path: Path) -> Checkpoint | Exported:
    if is_export(path):
        return Exported.open(path, verify=False)
    if (path / MANIFEST).is_file():
        return Checkpoint(path, read_manifest(path))  # damaged files are shown as such
    newest = candidates(path)
    if not newest:
        raise UserError(f"{path} is no checkpoint, no export and no run with a checkpoint; name one of these")
    return Checkpoint(newest[0], read_manifest(newest[0]))


def about(stored: Checkpoint | Exported) -> dict[str, Any]:
    """All but files and parameters. UserError: the manifest has other entries than it should."""
    manifest = stored.manifest
    try:
        shapes = [stored.shape_of(name) for name in stored.names()]
        data = manifest.get("data") or {}
        return {
            "path": str(stored.path),
            "kind": "export" if isinstance(stored, Exported) else "checkpoint",
            "step": int(manifest["step"]),
            "tokens": int(manifest["tokens"]),
            "run": str(manifest["config"]["run"]["name"]),
            "block": str(manifest["shape"]["block"]),
            "parameter_count": sum(math.prod(shape) for shape in shapes),
            "shape": manifest["shape"],
            "layout": manifest.get("layout"),
            "validation_loss": manifest.get("validation_loss"),
            "skipped": manifest.get("skipped"),
            "batch_sizes": data.get("batch_sizes"),
            "weights": data.get("weights"),
            "fingerprints": data.get("fingerprints"),
            "tokenizer": manifest.get("tokenizer"),
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{stored.path} has a manifest with other entries than it should: {error!r}") from error


def _files(stored: Checkpoint | Exported) -> dict[str, dict[str, Any]]:
    """Bytes and state ("ok", or what is wrong) of each file."""
    found = {}
    for name, entry in stored.manifest["files"].items():
        state = "ok"
        try:
            check_sizes(stored.path, {name: entry})
            check_hashes(stored.path, {name: entry}, [name])
        except (DamagedCheckpoint, OSError) as error:
            state = str(error).removeprefix(f"{stored.path / name} ")
        found[name] = {"bytes": int(entry["bytes"]), "state": state}
    return found


def rows_of(stored: Checkpoint | Exported) -> Iterator[Row]:
    dtype = str(stored.manifest.get("dtype", "float32"))
    for name in stored.names():
        shape = stored.shape_of(name)
        try:
            value = figures(stored.tensor("parameters", name))
            moments = [] if isinstance(stored, Exported) else [figures(stored.tensor(kind, name)) for kind in MOMENTS]
        except (UserError, OSError) as error:
            yield Row(name, shape, dtype, problem=str(error))
            continue
        first, second = (found.norm for found in moments) if moments else (None, None)
        yield Row(name, shape, dtype, value, first, second, sum(f.nonfinite for f in (value, *moments)))


def figures(tensor: Tensor) -> Figures:
    """Looked at in blocks: no second tensor of its size is made."""
    squares, total, count, nonfinite, low, high = 0.0, 0.0, 0, 0, math.inf, -math.inf
    for block in tensor.reshape(-1).split(_BLOCK):
        finite = block[block.isfinite()].double()
        nonfinite += block.numel() - finite.numel()
        if finite.numel():
            squares += float(finite.square().sum())
            total += float(finite.abs().sum())
            low, high, count = min(low, float(finite.min())), max(high, float(finite.max())), count + finite.numel()
    if not count:
        low = high = 0.0
    return Figures(math.sqrt(squares), low, high, total / max(count, 1), nonfinite)


def _head(report: dict[str, Any]) -> Iterator[str]:
    shape = report["shape"]
    yield f"{report['path']}: {report['kind']} of run {_plain(report['run'])}, step {report['step']:,}"
    yield (
        f"model {_plain(report['block'])}, {report['parameter_count']:,} parameters, {shape.get('layers')} layers, "
        f"width {shape.get('width')}; {report['tokens']:,} tokens read"
    )
    for name in ("layout", "validation_loss", "skipped", "batch_sizes", "weights", "fingerprints", "tokenizer"):
        if report[name] not in (None, [], {}):
            yield f"{name}: {json.dumps(report[name])}"
    for name, file in report["files"].items():
        state = file["state"] if file["state"] == "ok" else f"WRONG: {file['state']}"
        yield f"{name}: {file['bytes']:,} bytes, {state}"


def _plain(text: str) -> str:
    return text if text.isprintable() else ascii(text)


_FORM = "{:<48} {:<18} {:<9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}"
_COLUMNS = _FORM.format("parameter", "shape", "dtype", "norm", "min", "max", "mean |x|", "exp_avg", "exp_avg_sq")


def _line(row: Row) -> str:
    name, shape = _plain(row.name), " x ".join(map(str, row.shape))
    if row.value is None:
        return f"{name:<48} {shape:<18} WRONG: {row.problem}"
    value = row.value
    numbers = (value.norm, value.min, value.max, value.mean_abs, row.exp_avg, row.exp_avg_sq)
    cells = ["-" if number is None else f"{number:.4g}" for number in numbers]
    flag = f"  {row.nonfinite:,} NOT FINITE" if row.nonfinite else ""
    return _FORM.format(name, shape, row.dtype, *cells) + flag


def _last_line(report: dict[str, Any], rows: list[Row]) -> str:
    wrong = [name for name, file in report["files"].items() if file["state"] != "ok"]
    odd = [row.name for row in rows if row.problem or row.nonfinite]
    if wrong or odd:
        return f"{len(wrong)} damaged files, {len(odd)} parameters that are not finite or cannot be read"
    return "every file is as it was written, every value is finite"
