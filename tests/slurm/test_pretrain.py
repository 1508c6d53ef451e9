"""slurm/pretrain.sbatch on a real SLURM: what a run loses to a limit, a preemption, a lost node. Nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.trainings import EVERY, STEPS, Training, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="module")
def whole(whole_cluster: SlurmCluster, folder: Path) -> Training:
    """An uninterrupted run, with the preflight before it."""
    training = Training(whole_cluster, folder, "whole")
    training.end()
    return training


def test_a_training_on_two_nodes_ends_well_after_its_preflight(whole: Training) -> None:
    assert whole.end()["JobState"] == "COMPLETED", whole.output()
    assert list(whole.losses()) == list(range(1, STEPS + 1))
    assert "all-reduce" in whole.output()
    assert "4 processes = data 1 x sequence 2 x tensor 2" in whole.log(0, 0)
    assert (whole.run / "summary.json").is_file()


def test_the_notice_before_the_limit_saves_requeues_and_goes_on(
    cluster: SlurmCluster, folder: Path, whole: Training
) -> None:
    training = Training(cluster, folder, "notice", "--no-preflight")
    training.wait_step(6)
    cluster.run("scancel", "--batch", "--signal=USR1", training.number)  # what --signal=B:USR1@300 does
    ended = training.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), training.output()
    assert training.losses() == whole.losses()
    assert "USR1: every task is told to save and stop" in training.output()
    assert "started again (restart 1 of at most 20)" in training.output()
    assert "resumes after step" in training.log(1, 0)


def test_a_cancelled_training_ends_soon_and_is_not_started_again(
    cluster: SlurmCluster, folder: Path, whole: Training
) -> None:
    training = Training(cluster, folder, "cancelled", "--no-preflight")
    training.wait_step(EVERY + 1)
    cluster.run("scancel", training.number)
    ended = cluster.wait_job(training.number, timeout=30)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), training.output()
    time.sleep(1)
    assert cluster.job(training.number)["JobState"] == "CANCELLED"
    again = Training(cluster, folder, "cancelled", "--no-preflight")
    assert again.end()["JobState"] == "COMPLETED", again.output()
    assert "resumes after step" in again.log(0, 0)
    assert again.losses() == whole.losses()


def test_a_preempted_training_goes_on_when_its_nodes_are_free(
    cluster: SlurmCluster, folder: Path, whole: Training
) -> None:
    training = Training(cluster, folder, "preempted", "--no-preflight")
    training.wait_step(EVERY + 1)
    urgent = cluster.sbatch(
        "--partition=high", "--nodes=3", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"
    )
    assert cluster.wait_job(urgent, timeout=60)["JobState"] == "COMPLETED"
    ended = training.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), training.output()
    assert training.losses() == whole.losses()


def test_a_training_that_loses_a_node_goes_on_with_the_spare(
    cluster: SlurmCluster, folder: Path, whole: Training
) -> None:
    training = Training(cluster, folder, "lost", "--no-preflight")
    training.wait_step(EVERY + 2)
    cluster.crash_node("node2")
    ended = training.end()
    assert ended["JobState"] == "COMPLETED", training.output()
    assert int(ended["Restarts"]) >= 1
    assert ended["NodeList"] == "node[1,3]"
    assert training.losses() == whole.losses()


@pytest.mark.long
def test_the_time_limit_itself_gives_notice(cluster: SlurmCluster, folder: Path) -> None:
    """SLURM looks at limits every half minute: this takes minutes."""
    training = Training(
        cluster, folder, "limit", "training.steps=100000", "--no-preflight", "--time", "2", "--notice", "60"
    )
    training.wait_until(lambda: cluster.hurry(training.number).get("Restarts") == "1" and training.is_running())
    assert "USR1: every task is told to save and stop" in training.output()
    training.wait_until(lambda: "resumes after step" in training.log(1, 0))
