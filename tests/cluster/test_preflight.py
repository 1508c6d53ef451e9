"""The verb `preflight` on real ranks: it lists everything at once, and ends whatever hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.test_meet import free_port
from tests.slurm.trainings import prepare
from tests.torchrun import ROOT
from titans_train.__main__ import main as verb

LIMIT = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("preflight"))


class Ranks:
    """Processes with the variables of ranks, started one by one: so that one can stay away or be stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.started: list[subprocess.Popen[str]] = []

    def start(self, rank: int, *args: str, world: int = 2) -> subprocess.Popen[str]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        variables = {name: str(value) for name, value in place.items()}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "titans_train", "preflight", "tiny.yaml", "parallel.sequence=1", *args]
        environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.started.append(
            subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
        )  # fmt: skip
        return self.started[-1]


@pytest.fixture
def ranks(folder: Path) -> Iterator[Ranks]:
    made = Ranks(folder)
    yield made
    for process in made.started:
        process.kill()
        process.communicate()


def test_everything_is_listed_with_its_value(ranks: Ranks) -> None:
    first, second = ranks.start(0), ranks.start(1)
    out, error = first.communicate(timeout=LIMIT)
    assert first.returncode == second.wait(LIMIT) == 0, error
    assert "2 processes on 1 node" in out
    for subject in ("devices", "memory", "software", "clock", "disk", "data", "all-reduce"):
        assert f" {subject} " in out
    assert "GB/s" in out
    assert "preflight: 0 errors" in out
    assert second.communicate()[0] == ""
    assert not list(ranks.folder.rglob(".preflight-*"))
    assert not (ranks.folder / "runs").exists()


def test_all_errors_are_listed_at_once(ranks: Ranks) -> None:
    wrong = ("data.path=nowhere", "--least-within", "1e6")
    first, second = ranks.start(0, *wrong), ranks.start(1, *wrong)
    out, error = first.communicate(timeout=LIMIT)
    assert first.returncode == second.wait(LIMIT) == 2, error
    assert out.count("  error ") == 2
    assert "nowhere/manifest.json" in out
    assert "at least 1e+06 expected" in out
    assert "preflight: 2 errors" in out
    assert "Traceback" not in error


def test_a_rank_that_never_comes_is_named(ranks: Ranks) -> None:
    first = ranks.start(0, "--seconds", "3")
    out, error = first.communicate(timeout=LIMIT)
    assert first.returncode == 2
    assert "no word within 3 s from rank 1 (which never came)" in error


def test_a_rank_that_hangs_is_named_with_its_host(ranks: Ranks) -> None:
    first, second = ranks.start(0, "--seconds", "8"), ranks.start(1, "--seconds", "8")
    deadline = time.monotonic() + LIMIT
    while "libtorch_cpu" not in Path(f"/proc/{second.pid}/maps").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    os.kill(second.pid, signal.SIGSTOP)
    _, error = first.communicate(timeout=LIMIT)
    assert first.returncode == 2
    assert "rank 1" in error


def test_a_first_rank_that_is_not_there_is_named(ranks: Ranks) -> None:
    second = ranks.start(1, "--seconds", "2")
    _, error = second.communicate(timeout=LIMIT)
    assert second.returncode == 2
    assert f"rank 1 could not reach rank 0 at 127.0.0.1:{ranks.port} within 2 s" in error


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_wait_that_is_none_is_refused(folder: Path, seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(["preflight", str(folder / "tiny.yaml"), f"--seconds={seconds}"]) == 2
    assert f"--seconds: it is {seconds}; more than 0" in capsys.readouterr().err


def test_another_number_of_processes_is_refused(ranks: Ranks) -> None:
    first = ranks.start(0, "--world", "4")
    _, error = first.communicate(timeout=LIMIT)
    assert first.returncode == 2
    assert "4 were asked for, 2 started" in error
