"""slurm/pretrain.sbatch, on a real SLURM: how a job ends whose tasks do, or do not do, what a training does.

Its PYTHON is a shell script: in place of `titans_train train` it writes a checkpoint's name, ends as it is told, or
never starts. Everything else of the job is real.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.trainings import prepare
from tests.torchrun import ROOT

LIMIT = 120
NAME = 'lä"uf\\e'
# $1 of a task: rank.py; of its command: run_folder.py or -m titans_train train
STAND_IN = """#!/bin/sh
case "$*" in
    */rank.py*) {rank} ;;
    */run_folder.py*) {plan} ;;
    *) {train}; exit ;;
esac
exec {python} "$@"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("ends"))


class Job:
    """Ranks of one node, whose steps do what `parts` say: shell commands for rank, plan and train."""

    def __init__(
        self, cluster: SlurmCluster, folder: Path, at: Path, variables: dict[str, str], ranks: int = 1, **parts: str
    ) -> None:
        self.cluster, self.at = cluster, at
        python = at / "python"
        commands = {"rank": ":", "plan": ":", "train": ":"} | parts
        python.write_text(STAND_IN.format(python=shlex.quote(sys.executable), **commands))
        python.chmod(0o755)
        given = {"PYTHON": str(python), "TITANS_CPU": "1", "PREFLIGHT": "0", "LOG_DIR": str(at)} | variables
        words = [f"--export=ALL,{','.join(f'{name}={value}' for name, value in given.items())}", f"--output={at}/out"]
        config = ["tiny.yaml", f"run.folder={at}/{NAME}", "parallel.tensor=1", "parallel.sequence=1"]
        file = ROOT / "slurm" / "pretrain.sbatch"
        self.number = cluster.sbatch(*words, f"--ntasks-per-node={ranks}", "--job-name=j", file, *config, cwd=folder)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not (self.at / name).exists():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return (self.at / "out").read_text()

    def end(self) -> tuple[str, str, str]:
        ended = self.cluster.wait_job(self.number, timeout=LIMIT)
        return ended["JobState"], ended["ExitCode"], ended["Restarts"]


def test_a_step_that_srun_calls_good_but_that_ran_nothing_is_a_failure(
    cluster: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    job = Job(cluster, folder, tmp_path, {}, rank='case "$*" in *train*) exit 0 ;; esac')
    assert job.end() == ("FAILED", "1:0", "0"), job.said()
    assert "only 0 of 1 tasks ran" in job.said()
    assert "finished" not in job.said()


def test_a_crash_after_progress_goes_on_whatever_its_folders_are_called(
    cluster: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    """And a count of restarts that the shell had from elsewhere does not count; 08 is a number."""
    logs = tmp_path / "100%t \\%j"
    logs.mkdir()
    made = f"{shlex.quote(f'{tmp_path}/{NAME}')}/whole/checkpoints"
    train = f"if [ -e {made} ]; then echo again; exit 0; fi; mkdir -p {made}; echo step-4 >{made}/latest; exit 9"
    variables = {"LOG_DIR": str(logs), "MAX_RESTARTS": "08", "SLURM_RESTART_COUNT": "99"}
    job = Job(cluster, folder, tmp_path, variables, train=train)
    assert job.end() == ("COMPLETED", "0:0", "1"), job.said()
    assert "ended with status 9; the last lines of" in job.said()
    assert (
        "crashed after its checkpoints went from none to step-4; started again (restart 1 of at most 8)" in job.said()
    )
    assert (logs / f"j-{job.number}" / "r1-rank-0.log").read_text() == "again\n"


def test_a_preemption_before_the_training_starts_the_job_again(
    cluster: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    once = f"[ -e {tmp_path}/there ] || {{ touch {tmp_path}/there; exec sleep {LIMIT}; }}"
    job = Job(cluster, folder, tmp_path, {}, plan=once)
    job.wait_for("there")
    cluster.run("scancel", "--signal=TERM", job.number)  # what a preemption sends first, and to the steps alone
    assert job.end() == ("COMPLETED", "0:0", "1"), job.said()
    assert "stopped before the training began; started again" in job.said()


def test_a_rank_that_a_signal_ends_before_it_can_mind_it_keeps_no_other_waiting(
    cluster: SlurmCluster, folder: Path, tmp_path: Path
) -> None:
    train = f'[ "$RANK" = 1 ] || trap "" USR2; touch {tmp_path}/there-$RANK; sleep {LIMIT}'
    job = Job(cluster, folder, tmp_path, {"MAX_RESTARTS": "0"}, ranks=2, train=train)
    job.wait_for("there-0")
    job.wait_for("there-1")
    cluster.run("scancel", "--batch", "--signal=USR2", job.number)
    assert job.end() == ("FAILED", "75:0", "0"), job.said()
    assert "rank 1 on node1 was ended by SIGUSR2\n" in job.said()
    assert "saved and stopped" in job.said()


def test_slurms_own_restarts_count(cluster: SlurmCluster, folder: Path, tmp_path: Path) -> None:
    train = f"touch {tmp_path}/there; sleep {LIMIT}"
    job = Job(cluster, folder, tmp_path, {"MAX_RESTARTS": "0"}, train=train)
    job.wait_for("there")
    cluster.run("scontrol", "requeue", job.number)
    cluster.wait_job(job.number, {"PENDING"})
    assert job.end() == ("FAILED", "2:0", "1"), job.said()
    assert "had its MAX_RESTARTS=0 restarts" in job.said()


def test_one_step_that_cannot_start_is_no_lost_node(cluster: SlurmCluster, folder: Path, tmp_path: Path) -> None:
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    path = cluster.environment["PATH"]
    refuses = f'case "$*" in *--overlap*) [ -e {tmp_path}/refused ] || {{ touch {tmp_path}/refused; exit 1; }} ;; esac'
    srun.write_text(f'#!/bin/sh\n{refuses}\nPATH={path} exec srun "$@"\n')
    srun.chmod(0o755)
    job = Job(cluster, folder, tmp_path, {"PATH": f"{srun.parent}:{path}"}, train="exit 7")
    assert job.end() == ("FAILED", "7:0", "0"), job.said()
    assert (tmp_path / "refused").exists()
    assert "not started again" in job.said()
