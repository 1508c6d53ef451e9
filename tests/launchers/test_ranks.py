"""launchers/ranks.py: what a signal, an exit code and a death become, with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "launchers" / "ranks.py"
WORKER = Path(__file__).with_name("rank_worker.py")
LIMIT = 60


class Launch:
    """One launcher with a worker of the given action per rank."""

    def __init__(self, folder: Path, *actions: str, options: tuple[str, ...] = (), **changes: str) -> None:
        self.folder, self.ranks = folder, len(actions)
        command = [sys.executable, str(LAUNCHER), "--processes", str(len(actions)), *options, "--"]
        self.process = subprocess.Popen(
            [*command, sys.executable, str(WORKER), str(folder), *actions],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **changes},
        )  # fmt: skip

    def ready(self) -> list[dict[str, Any]]:
        """What each rank said of itself, once all have."""
        paths = [self.folder / f"rank-{rank}" for rank in range(self.ranks)]
        wait_until(lambda: all(path.exists() for path in paths))
        return [json.loads(path.read_text()) for path in paths]

    def end(self) -> tuple[int, str, str]:
        out, error = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, error


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def begin(*actions: str, **options: Any) -> Launch:
        started.append(Launch(tmp_path, *actions, **options))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill()
        each.process.communicate()


@pytest.mark.parametrize(
    ("actions", "status"),
    [
        (["exit 0", "exit 0"], 0),
        (["exit 75", "exit 75"], 75),
        (["exit 0", "exit 75"], 75),
        (["exit 2", "exit 2"], 2),
        (["exit 0", "exit 9"], 9),
        (["exit 3"], 3),
    ],
)
def test_the_exit_code_of_the_ranks_is_the_launchers(
    launch: Callable[..., Launch], actions: list[str], status: int
) -> None:
    assert launch(*actions).end()[0] == status


def test_ranks_are_told_who_they_are_and_where_to_meet(launch: Callable[..., Launch]) -> None:
    facts = launch("exit 0", "exit 0", TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="3").ready()
    assert [f["RANK"] for f in facts] == [f["LOCAL_RANK"] for f in facts] == ["0", "1"]
    assert {(f["WORLD_SIZE"], f["LOCAL_WORLD_SIZE"], f["MASTER_ADDR"]) for f in facts} == {("2", "2", "127.0.0.1")}
    assert len({f["MASTER_PORT"] for f in facts}) == 1
    assert 20000 <= int(facts[0]["MASTER_PORT"]) < 32768
    assert facts[0]["OMP_NUM_THREADS"] == "3"
    assert facts[0]["torchelastic"] == []


def test_ranks_of_a_second_host_go_on_counting(launch: Callable[..., Launch], tmp_path: Path) -> None:
    where = ("--processes", "1", "--nodes", "2", "--node-rank", "1", "--address", "10.1.2.3", "--port", "29123")
    assert launch("exit 1", "exit 0", options=where).end()[0] == 0
    facts = json.loads((tmp_path / "rank-1").read_text())
    assert (facts["LOCAL_RANK"], facts["WORLD_SIZE"], facts["LOCAL_WORLD_SIZE"]) == ("0", "2", "1")
    assert (facts["MASTER_ADDR"], facts["MASTER_PORT"]) == ("10.1.2.3", "29123")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_signal_to_the_launcher_reaches_every_rank(launch: Callable[..., Launch], tmp_path: Path, name: str) -> None:
    launched = launch("wait", "wait")
    launched.ready()
    launched.process.send_signal(signal.Signals[name])
    status, _, error = launched.end()
    heard = "SIGTERM" if name in ("SIGINT", "SIGHUP") else name
    assert [(tmp_path / f"heard-{rank}").read_text() for rank in range(2)] == [heard] * 2
    assert status == 75
    assert f"{name}: every rank is told to save and stop" in error


@pytest.mark.parametrize("other", ["deaf", "misses 1"])
def test_a_signal_before_a_rank_can_hear_it_asks_for_a_new_start(launch: Callable[..., Launch], other: str) -> None:
    launched = launch("default", other)
    launched.ready()
    launched.process.send_signal(signal.SIGUSR1)
    status, _, error = launched.end()
    assert status == 75
    assert "exit code" not in error


def test_a_signal_while_the_launcher_itself_starts_is_not_lost(launch: Callable[..., Launch]) -> None:
    launched = launch("wait", "wait")
    blocked = Path(f"/proc/{launched.process.pid}/status")
    wait_until(lambda: int(blocked.read_text().split("SigBlk:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1 == 1)
    launched.process.send_signal(signal.SIGUSR1)  # it imports, or looks for a port
    status, _, error = launched.end()
    assert status == 75
    assert "SIGUSR1: every rank is told to save and stop" in error


def test_a_bad_end_is_named_and_ends_the_others_even_a_stopped_one(launch: Callable[..., Launch]) -> None:
    launched = launch("signal 9", "deaf", "child")
    facts = launched.ready()
    os.kill(facts[1]["pid"], signal.SIGSTOP)
    status, _, error = launched.end()
    assert status == 128 + signal.SIGKILL
    assert error.count("launcher:") == 1
    assert f"rank 0 (pid {facts[0]['pid']}) was ended by SIGKILL; the others are ended" in error
    wait_until(lambda: not any(map(is_alive, [*(f["pid"] for f in facts), facts[2]["child"]])))


def test_a_bad_end_after_a_good_one_counts(launch: Callable[..., Launch]) -> None:
    launched = launch("exit 0", "deaf")
    facts = launched.ready()
    wait_until(lambda: not is_alive(facts[0]["pid"]))
    os.kill(facts[1]["pid"], signal.SIGKILL)
    status, _, error = launched.end()
    assert status == 128 + signal.SIGKILL
    assert f"rank 1 (pid {facts[1]['pid']}) was ended by SIGKILL" in error


def test_a_rank_that_does_not_end_with_the_others_is_ended(launch: Callable[..., Launch]) -> None:
    launched = launch("exit 0", "deaf", options=("--end-seconds", "1"))
    pid = launched.ready()[1]["pid"]
    status, _, error = launched.end()
    assert status == 1
    assert f"rank 1 (pid {pid}) did not end within 1 s of rank 0" in error
    assert not is_alive(pid)


def test_no_rank_outlives_a_killed_launcher(launch: Callable[..., Launch]) -> None:
    launched = launch("deaf", "deaf")
    pids = [f["pid"] for f in launched.ready()]
    launched.process.kill()
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_second_interrupt_ends_all_at_once(launch: Callable[..., Launch]) -> None:
    launched = launch("deaf", "deaf")
    pids = [f["pid"] for f in launched.ready()]
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    launched.process.send_signal(signal.SIGINT)
    status, _, error = launched.end()
    assert status == 128 + signal.SIGINT
    assert "interrupted twice" in error
    assert not any(map(is_alive, pids))


def test_each_start_leaves_a_log_of_each_rank_and_its_output_goes_through(
    launch: Callable[..., Launch], tmp_path: Path
) -> None:
    options = ("--log-dir", str(tmp_path / "logs"))
    for _ in range(2):
        _, out, error = launch("exit 0", "exit 0", options=options).end()
        assert sorted(out.splitlines()) == ["rank 0 says exit", "rank 1 says exit"]
        assert sorted(error.splitlines()) == ["rank 0 errs", "rank 1 errs"]
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert sorted(logs) == [f"start-{start}-rank-{rank}.log" for start in range(2) for rank in range(2)]
    assert "rank 1 says exit\n" in logs["start-1-rank-1.log"]
    assert "rank 1 errs\n" in logs["start-1-rank-1.log"]


def test_a_port_in_use_is_named_before_any_rank_starts(launch: Callable[..., Launch], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        status, _, error = launch("exit 0", options=("--port", str(port))).end()
    assert status == 1
    assert f"port {port} is in use on this host" in error
    assert not (tmp_path / "rank-0").exists()


def test_a_command_that_cannot_start_is_named(launch: Callable[..., Launch]) -> None:
    command = [sys.executable, str(LAUNCHER), "--processes", "2", "--", "/nowhere/python"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 1
    assert result.stderr.startswith("error: /nowhere/python cannot be started")
    assert "Traceback" not in result.stderr
