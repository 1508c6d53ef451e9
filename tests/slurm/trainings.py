"""A small training for the cluster of this folder's tests: 2 nodes x 2 ranks, tensor 2 x sequence 2."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from tests.data.corpus import prepare_folder
from tests.slurm.cluster import ENDED, SlurmCluster

STEPS, EVERY = 16, 4
LIMIT = 400  # seconds, for what takes twenty on an idle machine


def prepare(folder: Path) -> Path:
    """A folder with data and tiny.yaml, where trainings can be submitted."""
    prepare_folder(folder)
    config = {
        "run": {"name": "whole", "folder": "runs"},
        "model": {"block": "mag", "layers": 2, "width": 32, "heads": 2, "vocabulary": 264},
        "memory": {"chunk_size": 8, "expansion": 2},
        "attention": {"window": 16},
        "parallel": {"tensor": 2, "sequence": 2},
        "data": {"path": "prepared", "workers": 0},
        "training": {"steps": STEPS, "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 1},
        "checkpoint": {"every": EVERY},
        "monitoring": {"log_every": 1, "validation_sequences": 4, "peak_flops": 1e11},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    return folder


class Training:
    """A job that trains into runs/NAME of the folder."""

    def __init__(self, cluster: SlurmCluster, folder: Path, name: str, *options: str, nodes: int = 2) -> None:
        self.cluster, self.folder, self.name = cluster, folder, name
        layout = ("--nodes", str(nodes), "--cpu", "--ranks-per-node", "2", "--cpus", "2")
        command = (sys.executable, "-m", "titans_train", "submit", "tiny.yaml", f"run.name={name}", *layout, *options)
        self.number = re.findall(r"submitted job (\d+)", cluster.run(*command, cwd=folder).stdout)[0]

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.name

    def losses(self) -> dict[int, float]:
        """By step, so far."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return {}
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        return {line["step"]: line["loss"] for line in whole if "loss" in line}

    def output(self) -> str:
        path = self.folder / f"{self.name}-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def log(self, start: int, rank: int) -> str:
        path = self.folder / "logs" / f"{self.name}-{self.number}" / f"r{start}-rank-{rank}.log"
        return path.read_text() if path.exists() else ""

    def is_running(self) -> bool:
        return self.cluster.job(self.number)["JobState"] == "RUNNING"

    def wait_step(self, step: int) -> None:
        self.wait_until(lambda: max(self.losses(), default=0) >= step)

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not true():
            assert time.monotonic() < deadline, self.output()
            assert self.cluster.job(self.number)["JobState"] not in ENDED, self.output()
            time.sleep(0.1)

    def end(self) -> dict[str, str]:
        return self.cluster.wait_job(self.number, timeout=LIMIT)
