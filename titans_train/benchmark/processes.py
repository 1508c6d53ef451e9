"""Benchmarks that compare layouts: a table with one or more rows per layout, each made on real gloo processes.

A benchmark NAME has layouts (dataclasses with `ranks`) and a worker that reads a job file, {"layouts": [...], ...},
and replaces it by the rows, a JSON list.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def rows_of(name: str, layouts: Sequence[Any], **beside: Any) -> list[dict[str, Any]]:
    """The rows of all layouts; `beside` goes into the job. Starts the processes once for each number of ranks."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in sorted({layout.ranks for layout in layouts}):
            job = Path(folder) / f"{ranks}.json"
            fitting = [asdict(layout) for layout in layouts if layout.ranks == ranks]
            job.write_text(json.dumps({"layouts": fitting, **beside}))
            _start(name, ranks, job)
            rows += json.loads(job.read_text())
    return rows


def _start(name: str, ranks: int, job: Path) -> None:
    """RuntimeError with what the processes wrote, if one fails."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "titans_train", "benchmark", name, "--worker", str(job),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        own = [line for line in lines if line.startswith("[rank")] or lines
        raise RuntimeError(f"{name} on {ranks} ranks failed:\n" + "\n".join([done.stdout[-2000:], *own[-30:]]))


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """With --json, a file for all rows, and --worker, the job file of a process."""
    parser = argparse.ArgumentParser(prog=f"python -m titans_train benchmark {name}", description=description)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def report(rows: list[dict[str, Any]], table: str, path: Path | None, wrong: list[dict[str, Any]], why: str) -> int:
    """Prints the table, writes the rows to `path` if given, names the wrong ones. Exit status: 1 if there are any."""
    print(table)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1) + "\n")
    for row in wrong:
        print(f"{why}: {row}", file=sys.stderr)
    return 1 if wrong else 0
