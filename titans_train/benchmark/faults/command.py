"""The command: runs the faults one after another, prints the table, keeps every trial as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import titans_train.benchmark.faults as faults
from titans_train.benchmark.faults.lab import Lab, Unavailable
from titans_train.benchmark.faults.trial import Row, Trial, table
from titans_train.errors import UserError

# name: (the module beside this one and its function, the row's text)
FAULTS = {
    "kill": ("kills.random_kills", "kill -9 of a random rank at a random step"),
    "save": ("kills.saves", "kill -9 at a stage of a save"),
    "load": ("kills.loads", "kill -9 at a stage of a load"),
    "signals": ("stops.signals", "SIGTERM, SIGUSR1, SIGUSR2 to one rank, all ranks, the launcher"),
    "disk": ("disks.disks", "disk full or read-only at a save"),
    "checkpoint": ("checkpoints.checkpoints", "checkpoint files flipped, cut, lost, swapped"),
    "shard": ("shards.shards", "data shards flipped, cut, lost, swapped"),
    "frozen": ("stops.frozen", "a frozen rank (SIGSTOP)"),
    "nan": ("nonfinite.nonfinite", "NaN in one rank's gradient or loss"),
    "node": ("cluster.lost_node", "a lost SLURM node"),
    "preempted": ("cluster.preempted", "a preempted SLURM job"),
    "preparation": ("preparation.preparation", "data preparation, killed"),
    "two": ("two_jobs.two_jobs", "two jobs in one run folder"),
    "long": ("long_run.long_run", "{steps:,} tiny steps: growth of memory, files, threads, shared memory"),
}


def trials_of(name: str, lab: Lab) -> Iterator[Trial]:
    module, function = FAULTS[name][0].split(".")
    inject: Callable[[Lab], Iterator[Trial]] = getattr(
        importlib.import_module(f"titans_train.benchmark.faults.{module}"), function
    )
    yield from inject(lab)


def run_row(name: str, lab: Lab) -> Row:
    row, begun = Row(name, FAULTS[name][1].format(steps=lab.tiny_steps)), time.monotonic()
    try:
        for trial in trials_of(name, lab):
            row.trials.append(trial)
            verdict = "survived" if trial.survived else f"NOT survived: {trial.note}"
            found = "" if trial.seconds is None else f", detected in {trial.seconds:.1f} s"
            lost = "" if trial.steps_lost is None else f", {trial.steps_lost} steps lost"
            print(f"{name}: {trial.case}: {verdict}{lost}{found}", file=sys.stderr, flush=True)
    except Unavailable as error:
        row.absent, row.excused = f"not possible on this machine: {error}", True
    except Exception as error:  # what the row's trials need could not be made; the table goes on
        told = f"{error}" if isinstance(error, RuntimeError) else traceback.format_exc()
        row.trials.append(Trial("before the fault", False, note=told))
        print(f"{name}: {told}", file=sys.stderr, flush=True)
    if not row.trials and not row.absent:
        row.absent = "there was nothing to strike at"
    if row.absent:
        print(f"{name}: not tried: {row.absent}", file=sys.stderr, flush=True)
    row.seconds = time.monotonic() - begun
    return row


def keep(path: Path, rows: list[Row], command: str) -> None:
    versions = {name: version(name) for name in ("torch", "deepspeed", "megatron-core", "mosaicml-streaming")}
    machine = f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    found = {"command": command, "versions": versions, "machine": machine, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str]) -> int:
    """Exit status: 1 if a trial was not survived, or a row not tried though this machine could.

    UserError: a number of seeds below 1, a folder that is in use.
    """
    parser = argparse.ArgumentParser(
        prog="python -m titans_train benchmark faults",
        description=faults.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--seeds", type=int, help="random kills (default: 20; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="one or two trials of each fault")
    parser.add_argument("--json", type=Path, help="file for all trials, written after each row")
    parser.add_argument("--folder", type=Path, help="keep runs and consoles here (default: a temporary folder)")
    options = parser.parse_args(argv)
    if options.seeds is not None and options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: at least 1 random kill is tried; give 1 or more")
    if options.folder is not None:
        _check_empty(options.folder)
    rows: list[Row] = []
    command = shlex.join(["python", "-m", "titans_train", "benchmark", "faults", *argv])
    with tempfile.TemporaryDirectory() as temporary:
        seeds = options.seeds or (1 if options.quick else 20)
        lab = Lab((options.folder or Path(temporary)).resolve(), options.quick, seeds)
        for name in options.only or FAULTS:
            rows.append(run_row(name, lab))
            if options.json:
                keep(options.json, rows, command)
    print(table(rows))
    return 0 if all(row.kept for row in rows) else 1


def _check_empty(folder: Path) -> None:
    """Files of an earlier table would be taken for this one's."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--folder {folder} is there and is not an empty folder; give another, or remove it")
