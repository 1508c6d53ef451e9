"""The tiny runs that faults are injected into, and what can be read from their folders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titans_train.benchmark.faults.job import Job
from titans_train.monitoring.metrics import read_metrics

STEPS, EVERY, KEEP = 14, 3, 2
RANKS = 2
FIGURES = ("loss", "grad_norm", "validation_loss")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "data 2, ZeRO 1": ("parallel.zero_stage=1",),
    "tensor 2": ("parallel.tensor=2", "parallel.sequence_parallel=true"),
    "sequence 2, carried state": ("parallel.sequence=2", "training.carry_state=true", "parallel.zero_stage=0"),
    "data 2, ZeRO 3": ("parallel.zero_stage=3",),
}
FIRST = next(iter(LAYOUTS))
Figures = dict[tuple[int, str], float]
Contents = dict[int, dict[str, str]]


def config_of(prepared: Path, runs: Path) -> dict[str, Any]:
    return {
        "run": {"name": "run", "folder": str(runs)},
        "model": {"block": "mag", "layers": 2, "width": 32, "heads": 2, "vocabulary": 264},
        "memory": {"chunk_size": 8, "expansion": 2},
        "attention": {"window": 16},
        "data": {"path": str(prepared), "workers": 1},
        "training": {"steps": STEPS, "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 1},
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": EVERY, "keep": KEEP},
        "monitoring": {
            "log_every": 1, "validation_sequences": 5, "validate_every": 5, "peak_flops": 1e11, "tensorboard": False
        },
    }  # fmt: skip


def per_step(layout: str) -> int:
    """Micro-batches that each rank's model is given in a step: of 4 rows, 1 at a time."""
    return 2 if layout.startswith("data") else 4


def figures(run: Path) -> Figures:
    """What a run has to give bit for bit: by step and name."""
    lines = read_metrics(run / "metrics.jsonl")
    return {(line["step"], name): line[name] for line in lines for name in FIGURES if name in line}


def contents(run: Path) -> Contents:
    """What the tensors of every file in each finished checkpoint are, by step and file."""
    found = {}
    for folder in (run / "checkpoints").glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit():
            files = sorted(folder.glob("*.safetensors"))
            found[int(number)] = {file.name: digest(file.read_bytes()) for file in files}
    return found


def digest(content: bytes) -> str:
    """Of a safetensors file: the same for the same tensors, in whatever order; of any other bytes: their own."""
    start = 8 + int.from_bytes(content[:8], "little")
    try:
        entries = json.loads(content[8:start])
        rows = []
        for name in sorted(entries.keys() - {"__metadata__"}):
            first, end = (start + offset for offset in entries[name]["data_offsets"])
            values = hashlib.sha256(content[first:end]).hexdigest()
            rows.append([name, entries[name]["dtype"], entries[name]["shape"], values])
    except (ValueError, KeyError, TypeError, AttributeError):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha256(json.dumps([len(content) - start, rows]).encode()).hexdigest()


@dataclass(frozen=True)
class Start:
    """One start of a run's command, and what the run had before it."""

    job: Job
    before: int  # last step in its metrics
    whole: Contents


@dataclass
class TrialRun:
    """A run folder and the command that trains in it."""

    name: str
    layout: str
    folder: Path
    settings: tuple[str, ...]
    starts: list[Start] = field(default_factory=list)

    @property
    def job(self) -> Job:
        """The one that was started last."""
        return self.starts[-1].job


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    run: Path
    figures: Figures
    checkpoints: Contents
    given: dict[int, list[str]]  # by rank: digest of each batch
    files: dict[int, list[dict[str, str]]]  # by rank: what was done to files of checkpoints, in order
