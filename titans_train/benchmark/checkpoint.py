"""`benchmark checkpoint`: what it costs to save and to load, ours beside what else could have been chosen.

The same state (parameters and both Adam moments, fp32) of one model on real gloo processes, saved by each mechanism of
checkpoint_peers.py and loaded on the same layout and, where the mechanism can, on another; then a training loop that
saves every few steps, asynchronously, synchronously and not at all. Every load is compared with what was saved, element
by element: a row with a difference is void. Files are flushed before a save counts as complete.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from titans_train.benchmark.checkpoint_peers import MECHANISMS
from titans_train.benchmark.checkpoint_worker import work
from titans_train.benchmark.processes import parser_of, rows_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What is saved on, and which other layout of as many ranks it is loaded on, too."""

    tensor: int
    data: int
    zero: int
    other_tensor: int
    other_zero: int

    @property
    def ranks(self) -> int:
        return self.tensor * self.data


LAYOUTS = {
    "2": Layout(tensor=1, data=2, zero=1, other_tensor=2, other_zero=1),
    "2z3": Layout(tensor=1, data=2, zero=3, other_tensor=2, other_zero=2),
    "4": Layout(tensor=2, data=2, zero=1, other_tensor=1, other_zero=3),
}


def measure(names: list[str], job: Row, folder: Path | None) -> tuple[list[Row], list[Row]]:
    """Rows of saves, each layout in processes of its own; and rows of the training loop, on the first layout."""
    saves = [row for name in names for row in _rows(LAYOUTS[name], job, folder, "saves")]
    return saves, _rows(LAYOUTS[names[0]], job, folder, "training") if job["steps"] else []


def _rows(layout: Layout, job: Row, folder: Path | None, part: str) -> list[Row]:
    with tempfile.TemporaryDirectory(dir=folder) as here:
        return rows_of("checkpoint", [layout], part=part, folder=here, **job)


def text_of(tensor: int, ranks: int, zero: int) -> str:
    return f"tensor {tensor} x data {ranks // tensor}, ZeRO {zero}"


def table(saves: list[Row], training: list[Row]) -> str:
    """Markdown."""
    figures = {
        "a step is blocked, s": "blocked", "CPU of that": "blocked_cpu", "complete on disk after, s": "complete",
        "CPU of all ranks": "cpu", "loads, s": "load", "CPU": "load_cpu", "on the other layout, s": "load_other",
        "CPU there": "load_cpu_other", "cores others used": "others",
    }  # fmt: skip
    ends = ["MB", "more memory on the first rank, MB", "hashes files", "unpickles"]
    lines = [f"| layout | mechanism | {' | '.join([*figures, *ends])} |", "|---" * (len(figures) + 6) + "|"]
    for r in saves:
        cells = [text_of(r["tensor"], r["ranks"], r["zero"]), r["mechanism"]]
        cells += ["cannot" if r[key] is None else f"{r[key]:.2f}" for key in figures.values()]
        cells += [
            f"{r['bytes'] / 1e6:,.1f}",
            f"{r['extra_memory'] / 1e6:,.0f}",
            _yes(r["hashes"]),
            _yes(r["unpickles"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_training_table(training)] if training else lines)


def _training_table(rows: list[Row]) -> list[str]:
    columns = {
        "a step alone, s": "step", "beside a save, s": "step_beside", "that saves, s": "saving_step",
        "of it blocked, s": "blocked", "a save takes, s": "save", "mean of all steps, s": "mean",
        "left after the last, s": "left", "CPU of a step, all ranks, s": "cpu", "cores others used": "others",
    }  # fmt: skip
    without = next(r["mean"] for r in rows if r["mode"] == "none")
    lines = [f"| saving | {' | '.join(columns)} | mean, of that without saving |", "|---" * (len(columns) + 2) + "|"]
    for r in rows:
        figures = ["" if r[key] is None else f"{r[key]:.2f}" for key in columns.values()]
        lines.append(f"| {r['mode']} | {' | '.join(figures)} | {r['mean'] / without:.3f} |")
    return lines


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def void(row: Row) -> bool:
    """Whether something that was loaded is not what was saved."""
    return any(row[key] not in (0.0, None) for key in ("difference", "difference_other"))


def main(argv: list[str]) -> int:
    parser = parser_of("checkpoint", __doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--mechanisms", nargs="+", choices=MECHANISMS, default=list(MECHANISMS), help="default: all")
    parser.add_argument("--width", type=int, default=512, help="of the model (default: 512)")
    parser.add_argument("--layers", type=int, default=10, help="(default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over so many saves, after one more")
    parser.add_argument("--steps", type=int, default=20, help="of the training loop; 0: no loop (default: 20)")
    parser.add_argument("--every", type=int, default=4, help="the loop saves every so many steps (default: 4)")
    parser.add_argument("--loops", type=int, default=3, help="of each kind; medians are over them (default: 3)")
    parser.add_argument("--patience", type=float, default=0, help="s: measure again while other programs are busy")
    parser.add_argument("--folder", type=Path, help="write checkpoints below this (default: the temporary folder)")
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    job = {
        key: getattr(args, key)
        for key in ("mechanisms", "width", "layers", "rounds", "loops", "steps", "every", "patience")
    }
    saves, training = measure(args.layouts, job, args.folder)
    print(table(saves, training))
    print(
        f"\nMAG of {saves[0]['parameters']:,} parameters, {saves[0]['state'] / 1e6:,.0f} MB of state; the other layout "
        f"of each: {', '.join(sorted({_other(r) for r in saves}))}. Medians of {args.rounds}, the slowest rank's time."
    )
    if args.json is not None:
        found = {**_about(job, args.layouts), "saves": saves, "training": training}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    wrong = [row for row in saves if void(row)]
    for row in wrong:
        print(f"void, what was loaded is not what was saved: {row}", file=sys.stderr)
    return 1 if wrong else 0


def _other(row: Row) -> str:
    here, there = (text_of(row[f"{of}tensor"], row["ranks"], row[f"{of}zero"]) for of in ("", "other_"))
    return f"{here} -> {there}"


def _about(job: Row, layouts: list[str]) -> Row:
    libraries = ("torch", "deepspeed", "safetensors")
    options: list[Any] = ["--layouts", *layouts]
    for key, value in job.items():
        options += [f"--{key}", *(value if isinstance(value, list) else [value])]
    return {
        "command": shlex.join(["python", "-m", "titans_train", "benchmark", "checkpoint", *map(str, options)]),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "device": f"CPU, {platform.machine()}, {os.cpu_count()} cores, gloo, 1 thread per rank",
    }
