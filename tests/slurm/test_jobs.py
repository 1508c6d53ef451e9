"""What the job files do besides a training that is interrupted: refuse, crash, evaluate, prepare data."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster, command_line, variable
from tests.slurm.trainings import EVERY, LIMIT, Training, prepare
from tests.torchrun import ROOT

SUBMIT = (sys.executable, "-m", "titans_train", "submit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("jobs"))


def rank_processes(cluster: SlurmCluster, module: str) -> list[int]:
    """Pids of the ranks of a step that runs `python -m module`."""
    words = f"-m {module}"
    pids = [pid for pid in cluster.processes() if variable(pid, "RANK") is not None]
    return [pid for pid in pids if words in command_line(pid) and "rank.py" not in command_line(pid)]


def wait_rank(cluster: SlurmCluster, module: str) -> int:
    deadline = time.monotonic() + LIMIT
    while not (pids := rank_processes(cluster, module)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return pids[-1]


@pytest.mark.parametrize(
    ("file", "options", "variables", "arguments", "message"),
    [
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {}, ["tiny.yaml"], "set exactly one of VENV"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"PYTHON": "p", "VENV": "v"}, ["tiny.yaml"], "2 of them are set"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"VENV": "/nowhere"}, ["tiny.yaml"], "/nowhere/bin/python"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"CONTAINER_IMAGE": "i"}, ["tiny.yaml"], "no --container-image"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"TITANS_CPU": ""}, ["tiny.yaml"], "but 0 GPUs"),
        ("pretrain.sbatch", [], {}, ["tiny.yaml"], "give --ntasks-per-node"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {}, [], "name a config"),
        (
            "pretrain.sbatch",
            ["--ntasks-per-node=2"],
            {"MAX_RESTARTS": "x", "PYTHON": sys.executable},
            ["tiny.yaml"],
            "MAX_RESTARTS is 'x'; it is a number from 0",
        ),
        (
            "pretrain.sbatch",
            ["--ntasks-per-node=3"],
            {"PYTHON": sys.executable},
            ["tiny.yaml"],
            "is refused, 1 problem",
        ),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"END_SECONDS": "0", "PYTHON": "/bin/sh"}, ["tiny.yaml"], "END_S"),
        ("pretrain.sbatch", ["--ntasks-per-node=2"], {"MASTER_PORT": "a", "PYTHON": "/bin/sh"}, ["t.yaml"], "MASTER_P"),
        ("evaluate.sbatch", [], {"PYTHON": sys.executable, "TITANS_CPU": ""}, ["tiny.yaml"], "this job has no GPU"),
        ("evaluate.sbatch", [], {"PYTHON": sys.executable}, [], "name a config, a run or a checkpoint"),
        ("prepare_data.sbatch", [], {"PYTHON": sys.executable}, [], "say what to prepare"),
    ],
)
def test_what_is_missing_is_named_and_the_job_ends_with_2(
    cluster: SlurmCluster, folder: Path, tmp_path: Path, file: str, options: list[str], variables: dict[str, str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    given = [f"{name}={value}" for name, value in {"TITANS_CPU": "1", "LOG_DIR": str(tmp_path), **variables}.items()]
    command = [f"--export=ALL,{','.join(given)}", "--exclusive", f"--output={tmp_path}/out", *options]
    number = cluster.sbatch(*command, ROOT / "slurm" / file, *arguments, cwd=folder)
    ended = cluster.wait_job(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
    assert message in (tmp_path / "out").read_text()


@pytest.fixture(scope="module")
def crashed(whole_cluster: SlurmCluster, folder: Path) -> Training:
    """A rank is killed after a checkpoint; and again, once it has been started again, before the next one."""
    training = Training(whole_cluster, folder, "crashed", "parallel.sequence=1", "--no-preflight", nodes=1)
    training.wait_step(EVERY + 2)
    os.kill(wait_rank(whole_cluster, "titans_train train"), signal.SIGKILL)
    training.wait_until(lambda: whole_cluster.hurry(training.number).get("Restarts") == "1" and training.is_running())
    os.kill(wait_rank(whole_cluster, "titans_train train"), signal.SIGKILL)
    training.end()
    return training


def test_a_crash_is_started_again_only_after_progress(cluster: SlurmCluster, crashed: Training) -> None:
    ended, said = crashed.end(), crashed.output()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), said
    assert "crashed after its checkpoints went from none to step-0000000" in said
    assert "was ended by SIGKILL; the last lines of " in said
    assert "as before; not started again" in said


def test_a_job_that_had_its_restarts_ends(cluster: SlurmCluster, folder: Path) -> None:
    layout = ("parallel.sequence=1", "--no-preflight", "--max-restarts", "0")
    training = Training(cluster, folder, "capped", *layout, nodes=1)
    wait_rank(cluster, "titans_train train")
    cluster.run("scancel", "--batch", "--signal=USR2", training.number)
    ended = training.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0"), training.output()
    assert "this was restart 0 of at most MAX_RESTARTS=0; not started again" in training.output()


def test_a_run_is_evaluated(cluster: SlurmCluster, folder: Path, crashed: Training) -> None:
    figures = ("--kind", "evaluate", "--cpu", "--", "--sequences", "3", "--json", "figures.json")
    number = cluster.run(*SUBMIT, "runs/crashed", *figures, cwd=folder).stdout.split()[2]
    ended = cluster.wait_job(number, timeout=LIMIT)
    output = (folder / f"titans-evaluate-{number}.out").read_text()
    assert ended["JobState"] == "COMPLETED", output
    assert json.loads((folder / "figures.json").read_text())["sequences"] == 3
    assert "3 sequences of the validation split" in output


def test_data_are_prepared_by_a_job_that_was_interrupted(cluster: SlurmCluster, folder: Path) -> None:
    where = ("--input", "texts", "--output", "from-slurm", "--validation-share", "0.2", "--shard-size", "8192")
    said = cluster.run(*SUBMIT, "--kind", "prepare", "--cpus", "2", "--", *where, cwd=folder).stdout
    number = said.split()[2]
    wait_rank(cluster, "data_prep")
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    ended = cluster.wait_job(number, timeout=LIMIT)
    output = (folder / f"titans-prepare-{number}.out").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output
    assert "stopped; what is done is kept; started again (restart 1 of at most 20)" in output
    theirs, ours = (json.loads((folder / at / "manifest.json").read_text()) for at in ("from-slurm", "prepared"))
    assert theirs["splits"] == ours["splits"]
