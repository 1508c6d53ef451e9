"""metrics.jsonl and TensorBoard on resume: what an interrupted run wrote after its checkpoint is dropped."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.torchrun import ROOT
from titans_train.monitoring import appended
from titans_train.monitoring.appended import Appended
from titans_train.monitoring.console import duration
from titans_train.monitoring.metrics import Metrics, read_metrics
from titans_train.monitoring.throughput import measured_peak_flops, peak_memory_bytes


def test_later_lines_are_dropped_on_resume_and_tensorboard_agrees(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0, tensorboard=True)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "layer_0": {"alpha": 0.5}})
    first.close()
    again = Metrics(tmp_path, 3, tensorboard=True)
    again.write(4, {"loss": 40.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert "layer_0/alpha" in events.Tags()["scalars"]


def test_figures_that_are_not_finite_are_left_out_of_both(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(1, {"loss": float("nan"), "tokens": 7, "layer_0": {"alpha": float("inf"), "eta": 0.5}})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "tokens": 7, "layer_0": {"eta": 0.5}}
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert sorted(tags) == ["layer_0/eta", "tokens"]


def test_what_is_no_whole_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "loss": 2.5}', b"[1]", b'{"loss": 3}', b'{"step": "2"}', b"\xff\xfe", b"[" * 100_000]
    path.write_bytes(b"\n".join([*lines, b'{"step": 2, "loss": 2.25}', b'{"step": 3}', b'{"step": 4, "lo']))
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}, {"step": 3}]
    said: list[str] = []
    metrics = Metrics(tmp_path, 2, False, said.append)
    metrics.write(3, {"loss": 2.125})
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}, {"step": 3, "loss": 2.125},
    ]  # fmt: skip
    assert said == [f"{path}: 6 lines that are damaged or were cut are left out"]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: the first part of a write is taken, the rest refused."""
    before, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, action)


def test_a_full_disk_is_said_once_and_loses_nothing_in_either_file(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = Metrics(tmp_path, 0, True, said.append)
    path = tmp_path / "metrics.jsonl"
    with full_disk(200):
        for step in range(1, 21):
            metrics.write(step, {"loss": float(step)})
            assert all(line.endswith(b"}\n") for line in path.read_bytes().splitlines(keepends=True))
        metrics.text(20, "sample", "a")
    assert 0 < len(read_metrics(path)) < 20
    assert len(said) == 2 and all("cannot be written (File too large); training goes on" in line for line in said)
    metrics.write(21, {"loss": 21.0})
    metrics.close()
    assert [line["loss"] for line in read_metrics(path)] == list(range(1, 22))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(step, float(step)) for step in range(1, 22)]
    assert [line.rsplit("; ", 1)[1] for line in said[2:]] == ["nothing of it is lost"] * 2


def test_of_what_waits_for_room_the_oldest_is_lost_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appended, "KEPT", 3)
    said: list[str] = []
    file = Appended(tmp_path / "folder" / "file", said.append)
    (tmp_path / "folder").write_text("in the way")
    for letter in b"abcde":
        file.write(bytes([letter]))
    (tmp_path / "folder").unlink()
    file.write(b"f")
    assert (tmp_path / "folder" / "file").read_bytes() == b"def"
    assert said[1].endswith("the oldest 3 records that waited are lost") and len(said) == 2
    (tmp_path / "folder" / "file").unlink()
    (tmp_path / "folder" / "file").mkdir()
    file.write(b"g")
    file.close()
    assert said[-1].endswith("could not be written: its last 1 records are lost")


SPEAKS = """
import os
from titans_train.monitoring.console import Console
console = Console(True, 0, 10)
console.say("a line")
console.progress(1, 2.5, 1.0, 0.1, 100)
os._exit(7)
"""


def test_a_log_that_cannot_be_written_ends_nothing() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-c", SPEAKS], stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (7, b"")


def test_durations_and_device_figures_are_plausible() -> None:
    assert duration(59) == "0m59s" and duration(3661) == "1h01m"
    assert measured_peak_flops(256, 1) > 1e8 and peak_memory_bytes() > 10 * 2**20
