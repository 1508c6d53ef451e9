"""The verb `submit`, without a cluster: what is refused, what is warned of, and the command that would be run."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torchrun import ROOT
from titans_train.__main__ import main
from titans_train.cluster.submit import parse_time

QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
GPUS = ("--nodes", "2", "--gpus-per-node", "1")
FOURS = ("--nodes", "2", "--gpus-per-node", "4")
# in sbatch's place: writes down how it was called and what its job would inherit
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" "$TITANS_ROOT" "$VENV" "$PREFLIGHT" "$MAX_RESTARTS" \
    "$PYTHON$CONTAINER_IMAGE$TITANS_CPU$SLURM_RESTART_COUNT$MASTER_PORT" "$LOG_DIR" >>"$CALLS"
echo 7
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[str, str]:
    assert main(["submit", *args, "--dry-run"]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


def test_the_command_asks_for_what_the_run_needs(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    more = ("--time", "1-00:00:00", "--partition", "p q", "--account", "a", "--cpus", "6", "--sbatch=--qos=high")
    asked = words(dry(capsys, QUICKSTART, "training.global_batch_size=32", *FOURS, *more)[0])
    before = asked[: asked.index("sbatch")]
    assert {f"TITANS_ROOT={ROOT}", f"PYTHON={sys.executable}", "MAX_RESTARTS=20"} == {w for w in before if "=" in w}
    assert {
        f"--chdir={place}", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--exclusive", "--mem=0",
        "--time=1-00:00:00", "--partition=p q", "--account=a", "--cpus-per-task=6", "--signal=B:USR1@300", "--qos=high",
        "--job-name=quickstart", "--export=ALL",
    } == set(asked[asked.index("sbatch") + 1 : -3])  # fmt: skip
    assert asked[-3:] == [f"{ROOT}/slurm/pretrain.sbatch", QUICKSTART, "training.global_batch_size=32"]


def test_the_printed_command_can_be_run_again_and_does_the_same(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, calls = place / "with space", place / "calls"
    (folder / "bin").mkdir(parents=True)
    for path, text in ((folder / "sbatch", STAND_IN), (folder / "bin" / "python", "")):
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(calls))
    for name in ("PYTHON", "CONTAINER_IMAGE", "TITANS_CPU", "SLURM_RESTART_COUNT", "MASTER_PORT"):
        monkeypatch.setenv(name, "of another")
    monkeypatch.setenv("LOG_DIR", "/my logs")
    asked = (QUICKSTART, "monitoring.sample_prompt=def f(x): 'y'", *GPUS, "--venv", str(folder), "--no-preflight")
    printed, _ = dry(capsys, *asked)
    subprocess.run(["bash", "-c", printed], cwd="/", check=True, timeout=60)
    by_hand = calls.read_text()
    assert "monitoring.sample_prompt=def f(x): 'y'" in by_hand.splitlines()
    assert by_hand.splitlines()[-6:] == [str(ROOT), str(folder), "0", "20", "", "/my logs"]
    calls.unlink()
    assert main(["submit", *asked]) == 0
    assert "submitted job 7 (pretrain.sbatch)" in capsys.readouterr().out
    assert calls.read_text() == f"--parsable\n{by_hand}"


def test_a_login_node_imports_no_torch() -> None:
    code = "import sys; import titans_train.cluster.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        ([*GPUS], ["CONFIG.yaml: pretrain needs one"]),
        ([QUICKSTART], ["--nodes: it is None", "--gpus-per-node: it is None"]),
        ([QUICKSTART, "--nodes", "0", "--cpu", "--time", "soon"], ["--nodes: it is 0", "--ranks-per-node", "'soon'"]),
        ([QUICKSTART, *GPUS, "--ranks-per-node", "2"], ["each GPU has one rank"]),
        ([QUICKSTART, *GPUS, "--cpu", "--ranks-per-node", "2"], ["--cpu means no GPUs"]),
        ([QUICKSTART, *GPUS, "--time", "5"], ["300 s is too short for a job that saves 300 s before"]),
        ([QUICKSTART, *GPUS, "--max-restarts", "-1", "--cpus", "0"], ["--max-restarts: it is -1", "--cpus: it is 0"]),
        ([QUICKSTART, "model.heads=5", "--nodes", "3", "--gpus-per-node", "1"], ["model.heads", "3 data-parallel"]),
        ([QUICKSTART, *GPUS, "--venv", "nowhere"], ["nowhere/bin/python"]),
        ([QUICKSTART, *GPUS, "--mounts", "/a:/a"], ["--mounts is for --container"]),
        ([QUICKSTART, "--kind", "prepare"], ["prepare takes no config", "prepare needs data_prep's arguments"]),
        ([QUICKSTART, "--kind", "evaluate"], ["--gpus-per-node or --cpu: there is none"]),
        ([QUICKSTART, "--kind", "evaluate", "--cpu", "--nodes", "3"], ["--nodes: it is 3, but evaluate runs as one"]),
        (["--kind", "evaluate"], ["CONFIG.yaml: evaluate needs one"]),
        (["nowhere.yaml", "--kind", "evaluate", "--cpu"], ["there is no file nowhere.yaml"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_every_problem(
    args: list[str], messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *args, "--dry-run"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(message in said.err for message in messages), said.err


@pytest.mark.parametrize(
    ("tensor", "message"),
    [(8, "parallel.tensor 8 is more than the 4 ranks"), (1, ""), (2, "")],
)
def test_a_model_that_crosses_nodes_is_warned_of(tensor: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = (f"parallel.tensor={tensor}", "model.heads=8", "training.global_batch_size=32", "model.width=256")
    error = dry(capsys, QUICKSTART, *sizes, *FOURS)[1]
    assert message in error
    assert ("parallel.tensor" in error) == bool(message)


def test_groups_that_straddle_nodes_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("parallel.tensor=2", "training.global_batch_size=12")
    error = dry(capsys, QUICKSTART, *sizes, "--nodes", "2", "--gpus-per-node", "3")[1]
    assert "parallel.tensor 2 does not divide the 3 ranks of a node" in error


def test_a_folder_of_another_run_is_refused(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "runs" / "quickstart").mkdir(parents=True)
    (place / "runs" / "quickstart" / "letter.txt").write_text("")
    assert main(["submit", QUICKSTART, *GPUS]) == 2
    assert "is not empty and not a run" in capsys.readouterr().err


def test_without_slurm_the_remedy_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setenv("PATH", str(place))
    assert main(["submit", QUICKSTART, *GPUS]) == 2
    assert "there is no sbatch on PATH" in capsys.readouterr().err


def test_a_container_and_a_cpu_are_told_to_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = ("--nodes", "1", "--cpu", "--ranks-per-node", "2", "--container", "a/b:c", "--mounts", "/d:/d")
    out, _ = dry(capsys, QUICKSTART, *cpu)
    asked = words(out)
    assert {"CONTAINER_IMAGE=a/b:c", "CONTAINER_MOUNTS=/d:/d", "TITANS_CPU=1", "--ntasks-per-node=2"} < set(asked)
    assert not [word for word in asked if word.startswith(("PYTHON=", "VENV=", "--gpus", "--exclusive", "--mem"))]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 300), ("5:30", 330), ("1:00:00", 3600), ("2-12", 216000), ("1-1:30", 91800), ("1-0:0:1", 86401), ("x", None),
     ("UNLIMITED", math.inf), ("1:2:3:4", None), ("-5", None)],
)  # fmt: skip
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: float | None) -> None:
    assert parse_time(text) == seconds
