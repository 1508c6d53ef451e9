"""launchers/train.sh and train_nodes.sh: real runs on the CPU, two "nodes" in network namespaces of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.data.corpus import prepare_folder
from tests.launchers.test_meet import free_port
from titans_train.__main__ import main

LAUNCHERS = Path(__file__).resolve().parents[2] / "launchers"
LIMIT = 240  # seconds for a run that takes ten on an idle machine
CPU = ("--cpu", "--processes")
NODES = ("--nodes", "2", "--address", "127.0.0.1")
# what an interpreter stands in for that sees two GPUs, and shows what the ranks would be started with
PRETENDER = """#!/bin/sh
case "$*" in
    *device_count*) echo 2 ;;
    *ranks.py*) echo "ranks: $*"; env ;;
    *) exec {python} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    error: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a config whose paths are relative to the folder."""
    made = tmp_path_factory.mktemp("launch")
    prepare_folder(made)
    config = {
        "run": {"name": "one", "folder": "runs"},
        "model": {"block": "mag", "layers": 2, "width": 32, "heads": 2, "vocabulary": 264},
        "memory": {"chunk_size": 8, "expansion": 2},
        "attention": {"window": 16},
        "data": {"path": "prepared", "workers": 0},
        "training": {"steps": 3, "sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 1},
        "monitoring": {"log_every": 1, "validation_sequences": 4, "peak_flops": 1e11, "sample_tokens": 4},
    }
    (made / "tiny.yaml").write_text(yaml.safe_dump(config))
    return made


def environment(**changes: str) -> dict[str, str]:
    ours = ("OMP_", "CUDA_", "NCCL_", "GLOO_", "TORCH_", "DS_", "TITANS_", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"TITANS_PYTHON": sys.executable} | changes


def start(folder: Path, script: str, *args: str, prefix: tuple[str, ...] = (), **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, "bash", str(LAUNCHERS / script), *args],
        cwd=folder, env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(*launchers: subprocess.Popen[str]) -> list[Result]:
    """Waits for launchers; ends them, and thereby what they started, if they do not end by themselves."""
    try:
        said = [launcher.communicate(timeout=LIMIT) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)  # its ranks die with it
        for launcher in launchers:
            launcher.wait(60)
    return [Result(launcher.returncode, *texts) for launcher, texts in zip(launchers, said, strict=True)]


def run(folder: Path, script: str, *args: str, **changes: str) -> Result:
    return finish(start(folder, script, *args, **changes))[0]


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) for key in ("loss", "validation_loss") if key in record]


@pytest.fixture(scope="module")
def one_node(folder: Path) -> Result:
    return run(folder, "train.sh", "tiny.yaml", *CPU, "2")


def test_two_processes_on_one_node_train_to_the_end(folder: Path, one_node: Result) -> None:
    assert one_node.status == 0, one_node.error
    assert "training tiny.yaml on 2 CPU processes" in one_node.out
    assert (folder / "runs/one/summary.json").is_file()
    assert len(losses(folder, "one")) == 4


def test_a_signal_to_the_launcher_saves_and_asks_for_a_new_start(folder: Path) -> None:
    launcher = start(folder, "train.sh", "tiny.yaml", *CPU, "2", "training.steps=100000", "run.name=signalled")
    metrics, deadline = folder / "runs/signalled/metrics.jsonl", time.monotonic() + LIMIT
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    [result] = finish(launcher)
    assert result.status == 75, result.error
    assert "launcher: SIGUSR1: every rank is told to save and stop" in result.error
    assert (folder / "runs/signalled/checkpoints/latest").is_file()


@dataclass(frozen=True)
class Host:
    prefix: tuple[str, ...]
    interface: str


LOCAL = Host((), "lo")


@contextmanager
def two_hosts() -> Iterator[tuple[list[Host], str]]:
    """Two hosts with a network between them, and the first one's address; without the right to, twice this machine."""
    names = [f"titans-{os.getpid()}-{n}" for n in range(2)]
    interfaces = [f"tt{os.getpid()}{end}" for end in "ab"]
    ip = shutil.which("ip") or "ip"
    commands = [f"netns add {name}" for name in names]
    commands.append(f"link add {interfaces[0]} netns {names[0]} type veth peer name {interfaces[1]} netns {names[1]}")
    for n, (name, interface) in enumerate(zip(names, interfaces, strict=True)):
        commands += [f"-n {name} addr add 10.213.77.{n + 1}/30 dev {interface}"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", interface)]
    try:
        try:
            for command in commands:
                subprocess.run([ip, *command.split()], check=True, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(getattr(error, "stderr", "") or error).strip()
            warnings.warn(f"no network namespaces here ({reason}): both nodes share loopback", stacklevel=2)
            yield [LOCAL] * 2, "127.0.0.1"
            return
        yield [Host((ip, "netns", "exec", n), i) for n, i in zip(names, interfaces, strict=True)], "10.213.77.1"
    finally:  # the interfaces go with the namespaces
        for name in names:
            if Path("/run/netns", name).exists():
                subprocess.run([ip, "netns", "delete", name], check=False, timeout=30)


def start_node(
    folder: Path, rank: int, place: str, *args: str, host: Host = LOCAL, processes: str = "1"
) -> subprocess.Popen[str]:
    where = ["--nodes", "2", "--node-rank", str(rank), "--address", place, "--interface", host.interface]
    return start(
        folder, "train_nodes.sh", "tiny.yaml", *where, *CPU, processes, *args, prefix=host.prefix
    )  # fmt: skip


def test_two_nodes_train_as_one_does(folder: Path, one_node: Result) -> None:
    assert one_node.status == 0, one_node.error
    with two_hosts() as (hosts, address):
        place = f"{address}:{free_port()}"
        nodes = [start_node(folder, n, place, "--wait", "120", "run.name=two", host=hosts[n]) for n in range(2)]
        results = finish(*nodes)
    assert [result.status for result in results] == [0, 0], "\n".join(result.error for result in results)
    assert "training tiny.yaml on 2 CPU processes, 1 per node" in results[1].out
    assert (folder / "runs/two/summary.json").is_file()
    assert losses(folder, "two") == pytest.approx(losses(folder, "one"), rel=0, abs=1e-6)


def test_a_node_that_stays_away_ends_the_run(folder: Path) -> None:
    place = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    [result] = finish(start_node(folder, 0, place, "--wait", "3", "run.name=away"))
    assert result.status == 1
    assert time.monotonic() - began < 60
    assert f"1 of the 2 nodes asked for came to {place} within 3 s; missing: node 1" in result.error
    assert "firewall" in result.error
    assert "training tiny.yaml" not in result.out
    assert not (folder / "runs/away").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"processes": "2"}, "--processes is 2 on node 1 and 1 on node 0"), ({}, "the config's checksum is")],
)
def test_nodes_that_were_started_differently_are_refused(folder: Path, changes: dict[str, str], message: str) -> None:
    place = f"127.0.0.1:{free_port()}"
    setting = "training.steps=3" if changes else "training.steps=4"
    for result in finish(start_node(folder, 0, place), start_node(folder, 1, place, setting, **changes)):
        assert result.status == 1
        assert message in result.error
        assert "training tiny.yaml" not in result.out


@pytest.mark.parametrize("script", ["train.sh", "train_nodes.sh"])
def test_without_a_gpu_the_cpu_must_be_asked_for(folder: Path, script: str) -> None:
    nodes = ["--nodes", "2", "--node-rank", "0", "--address", "127.0.0.1"] if script == "train_nodes.sh" else []
    result = run(folder, script, "tiny.yaml", *nodes, CUDA_VISIBLE_DEVICES="")
    assert result.status == 1
    assert "torch sees no GPU on this host" in result.error
    assert "--cpu --processes N" in result.error
    assert result.out == ""


@pytest.mark.parametrize(
    ("script", "args", "message"),
    [
        ("train.sh", ["tiny.yaml", "--gpus", "2"], "there is no option '--gpus'"),
        ("train.sh", ["tiny.yaml", "--nodes", "2"], "there is no option '--nodes'"),
        ("train.sh", ["tiny.yaml", "steps=2"], "'steps=2' is no setting"),
        ("train.sh", ["tiny.yaml", "--cpu"], "--cpu needs --processes N"),
        ("train.sh", ["tiny.yaml", "--processes"], "--processes needs a value"),
        ("train.sh", ["tiny.yaml", "--cpu", "--processes", "0"], "'0' is not a number from 1 up"),
        ("train.sh", [], "name a config"),
        ("train_nodes.sh", ["tiny.yaml", "--nodes", "2", "--address", "a"], "--node-rank is needed"),
        ("train_nodes.sh", ["tiny.yaml", *NODES, "--node-rank", "2"], "ranks are 0 to 1"),
        ("train_nodes.sh", ["tiny.yaml", *NODES, "--node-rank", "0", "--address", "a:99999"], "ports are 1 to 65535"),
        ("train_nodes.sh", ["tiny.yaml", *NODES, "--node-rank", "0", "--address", "::1"], "is not HOST or HOST:PORT"),
    ],
)
def test_wrong_arguments_are_refused_with_the_usage(folder: Path, script: str, args: list[str], message: str) -> None:
    result = run(folder, script, *args)
    assert result.status == 2
    assert message in result.error.splitlines()[0]
    assert f"Usage: {script} CONFIG.yaml" in result.error


@pytest.mark.parametrize("script", ["train.sh", "train_nodes.sh"])
def test_help_lists_every_option(folder: Path, script: str) -> None:
    result = run(folder, script, "--help")
    assert result.status == 0
    known = re.findall(r'read_arguments "([^"]*)"', (LAUNCHERS / script).read_text())[0].split()
    assert all(f"  {option} " in result.out for option in [*known, "--cpu"])
    assert "set -euo" not in result.out


def test_what_cannot_be_trained_is_refused_before_any_rank_starts(folder: Path) -> None:
    for args, message in ((["2", "model.heads=5"], "model.heads"), (["3"], "3 data-parallel ranks")):
        result = run(folder, "train.sh", "tiny.yaml", *CPU, *args, "run.name=refused")
        assert result.status == 2
        assert message in result.error
        assert "training" not in result.out
    assert not (folder / "runs/refused").exists()


def test_an_interface_that_is_not_there_is_refused(folder: Path) -> None:
    if not Path("/sys/class/net").is_dir():
        pytest.skip("this system does not list its interfaces")
    [result] = finish(start_node(folder, 0, "127.0.0.1", host=Host((), "eth99")))
    assert result.status == 1
    assert "this host has no network interface 'eth99'; it has:" in result.error
    assert " lo" in result.error


@pytest.fixture
def pretender(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(PRETENDER.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def test_one_process_per_gpu_and_never_more(folder: Path, pretender: str) -> None:
    result = run(folder, "train.sh", "tiny.yaml", TITANS_PYTHON=pretender)
    assert result.status == 0, result.error
    assert re.search(r"ranks.py --processes 2 -- \S+ -m titans_train train tiny.yaml --world 2\n", result.out)
    assert {"OMP_NUM_THREADS=1", "CUDA_DEVICE_MAX_CONNECTIONS=1", "TORCH_NCCL_ASYNC_ERROR_HANDLING=1"} <= set(
        result.out.splitlines()
    )
    assert "DS_ACCELERATOR" not in result.out
    result = run(folder, "train.sh", "tiny.yaml", "--processes", "3", TITANS_PYTHON=pretender)
    assert result.status == 1
    assert "--processes 3 is more than the 2 GPUs" in result.error


def test_the_environment_of_the_caller_stays(folder: Path, pretender: str) -> None:
    nodes = ["--nodes", "1", "--node-rank", "0", "--address", f"127.0.0.1:{free_port()}", "--interface", "lo"]
    own = {"OMP_NUM_THREADS": "7", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_SOCKET_IFNAME": "ib"}
    result = run(folder, "train_nodes.sh", "tiny.yaml", *nodes, TITANS_PYTHON=pretender, **own)
    assert result.status == 0, result.error
    expected = {*(f"{name}={value}" for name, value in own.items()), "GLOO_SOCKET_IFNAME=lo"}
    assert expected <= set(result.out.splitlines())
    result = run(folder, "train_nodes.sh", "tiny.yaml", *nodes, *CPU, "1", TITANS_PYTHON=pretender)
    assert {"NCCL_SOCKET_IFNAME==lo", "DS_ACCELERATOR=cpu", "CUDA_VISIBLE_DEVICES="} <= set(result.out.splitlines())


def test_a_python_without_what_is_needed_is_refused(folder: Path) -> None:
    result = run(folder, "train.sh", "tiny.yaml", *CPU, "1", TITANS_PYTHON="/nowhere/python")
    assert result.status == 1
    assert "TITANS_PYTHON=/nowhere/python does not run" in result.error


@pytest.mark.parametrize("started", ["1", "4"])
def test_train_refuses_another_world_than_asked_for(
    folder: Path, started: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", started)
    assert main(["train", str(folder / "tiny.yaml"), "run.name=world", "--world", "2"]) == 2
    error = capsys.readouterr().err
    assert f"2 processes were asked for, but {started} started (WORLD_SIZE={started})" in error
    assert f"start 2 (torchrun: --nnodes times --nproc-per-node), or say --world {started}" in error
    assert not (folder / "runs/world").exists()
