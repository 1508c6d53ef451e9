"""A rank that hangs or dies ends the others within a configured time; each that can still answer says where it is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.data.corpus import prepare_folder
from tests.training.ranks import Ranks
from tests.training.worker import plan_of
from titans_train.config import dump_config
from titans_train.monitoring.metrics import read_metrics

WORKER = str(Path(__file__).with_name("hang_worker.py"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hangs")
    plan = plan_of(
        folder, prepare_folder(tmp_path_factory.mktemp("corpus")), "run", 1, 2, data={"workers": 1},
        training={"steps": 500}, checkpoint={"every": 1000},
        monitoring={
            "validate_every": None, "sample_every": None, "tensorboard": False, "hang_seconds": 4,
            "validation_sequences": 1,
        },
    )  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(dump_config(plan.config))
    return path


def stacks(run: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in run.glob("stacks/*/*")}


def heartbeat(run: Path) -> dict[str, object]:
    try:
        return dict(json.loads((run / "heartbeat.json").read_text()))
    except FileNotFoundError:
        return {}


def test_a_rank_that_hangs_ends_all_and_each_leaves_its_stacks(config: Path, tmp_path: Path) -> None:
    with Ranks(2, tmp_path, WORKER, "1", "sleep", str(config), "run.name=sleep") as ranks:
        assert ranks.statuses() == [1, 1], ranks.text() + ranks.text(1)
    left = stacks(config.parent / "sleep")
    assert set(left) == {"step-2-rank-0.txt", "step-2-rank-1.txt"}
    assert "train_step" in left["step-2-rank-0.txt"]  # it waits for the other in a collective
    assert "in wrong" in left["step-2-rank-1.txt"] and "readers.py" in left["step-2-rank-1.txt"]  # every thread
    for rank in (0, 1):
        assert f"rank {rank} on " in ranks.text(rank) and "monitoring.hang_seconds 4" in ranks.text(rank)
        assert f"step-2-rank-{rank}.txt" in ranks.text(rank)
    assert heartbeat(config.parent / "sleep")["step"] == 2


def test_a_rank_whose_interpreter_is_stuck_ends_too(config: Path, tmp_path: Path) -> None:
    with Ranks(2, tmp_path, WORKER, "1", "lock", str(config), "run.name=lock") as ranks:
        assert ranks.statuses() == [1, 1], ranks.text() + ranks.text(1)
    assert set(stacks(config.parent / "lock")) == {"step-2-rank-0.txt"}
    assert "Timeout" in ranks.text(1) and "in wrong" in ranks.text(1)


def test_a_frozen_rank_ends_the_others(config: Path, tmp_path: Path) -> None:
    run = config.parent / "frozen"
    with Ranks(2, tmp_path, "-m", "titans_train", "train", str(config), "run.name=frozen") as ranks:
        ranks.until(lambda: read_metrics(run / "metrics.jsonl"))
        ranks.signal(signal.SIGSTOP, [1])
        assert ranks.processes[0].wait(timeout=120) == 1, ranks.text()
        (name,) = stacks(run)
        assert name.endswith("-rank-0.txt") and ranks.processes[1].poll() is None
        beat = heartbeat(run)
        assert (
            beat["pid"] == ranks.processes[0].pid
            and beat["phase"] == "training"
            and beat["host"] == os.uname().nodename
        )


@pytest.mark.parametrize("what", ["dies", "raises"])
def test_a_rank_that_dies_ends_the_others_at_once(config: Path, tmp_path: Path, what: str) -> None:
    """Long before anyone looks for a hang, and without waiting on the way out for what cannot come."""
    run = config.parent / what
    command = ["-m", "titans_train", "train"] if what == "dies" else [WORKER, "1", "raise"]
    settings = [str(config), f"run.name={what}", "monitoring.hang_seconds=500"]
    with Ranks(2, tmp_path, *command, *settings) as ranks:
        if what == "dies":
            ranks.until(lambda: read_metrics(run / "metrics.jsonl"))
            ranks.signal(signal.SIGKILL, [1])
        assert ranks.statuses() == [1, -signal.SIGKILL if what == "dies" else 1], ranks.text() + ranks.text(1)
    assert "Traceback" in ranks.text(0)
    assert what == "dies" or "RuntimeError: of this rank alone" in ranks.text(1)
    assert stacks(run) == {}
