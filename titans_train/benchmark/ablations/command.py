"""The command: all variants on all tasks, several at a time; goes on where it was interrupted; then the report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from titans_train.benchmark.ablations.report import table, write_pictures
from titans_train.benchmark.ablations.run import Result, run_one
from titans_train.benchmark.ablations.variants import FOLDER, TASKS, Run, Variant, load_variants, runs
from titans_train.config import RunConfig
from titans_train.errors import UserError
from titans_train.outputs import check_file


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark ablations", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of every run")
    parser.add_argument("--configs", type=Path, default=FOLDER, help="folder with the tasks and variants.yaml")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--variants", nargs="+", help="names (default: all)")
    parser.add_argument("--seeds", type=int, help="at most so many of a variant")
    parser.add_argument("--cases", type=int, default=20, help="needles at each length and depth")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, a thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="of the runs; what is done stays")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    options = _arguments(argv)
    _check(options)
    variants = _chosen(load_variants(options.configs), options.variants)
    overrides = [*options.overrides, f"run.folder={options.folder}"]
    wanted = [(run, run.config(options.configs, overrides)) for run in runs(variants, options.tasks, options.seeds)]
    _check_data(wanted)
    try:
        results, failed = _all(wanted, options)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(table(results, variants))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.pictures and results:
        write_pictures(results, variants, options.pictures)
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    return 1 if failed else 0


def _check(options: argparse.Namespace) -> None:
    """UserError: what would fail after hours of training."""
    for name in ("workers", "cases", "seeds"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}; it is at least 1")
    check_file("--json", options.json)
    for folder in filter(None, (options.folder, options.pictures)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error}; give another folder") from error


def _chosen(variants: list[Variant], names: list[str] | None) -> list[Variant]:
    if unknown := set(names or ()) - {v.name for v in variants}:
        known = "; ".join(v.name for v in variants)
        raise UserError(f"there is no variant {sorted(unknown)[0]!r}; there are: {known}")
    return [v for v in variants if names is None or v.name in names]


def _check_data(wanted: list[tuple[Run, RunConfig]]) -> None:
    for path in {config.data.path for _, config in wanted if config.data.path}:
        if not (Path(path) / "manifest.json").is_file():
            command = f"python -m data_prep --default-corpus --output {path}"
            raise UserError(f"there are no prepared data in {path}; make them first: {command}")


def _all(wanted: list[tuple[Run, RunConfig]], options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Results in the order wanted, and what failed and why."""
    found: dict[str, Result] = {}
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(options.workers)  # each only waits for the processes that it starts
    try:
        jobs = {pool.submit(run_one, run, config, options.folder, options.cases): run for run, config in wanted}
        for number, job in enumerate(as_completed(jobs), 1):
            name = jobs[job].name
            try:
                found[name] = job.result()
                said = f"{found[name]['cpu_seconds']} CPU-s"
            except Exception as error:  # of whatever kind: the others go on, and this one is named
                failed[name] = said = f"{type(error).__name__}: {error}"
            print(f"{number} of {len(jobs)}: {name}: {said}", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, which the trainings get too, nothing new begins
    return [found[run.name] for run, _ in wanted if run.name in found], failed
