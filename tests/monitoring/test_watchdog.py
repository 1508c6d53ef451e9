"""The file for monitors outside, and what a watchdog does not do. tests/training/test_hangs.py has real hangs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from titans_train.monitoring.watchdog import Beat, Heartbeat, Watchdog


def test_the_heartbeat_says_when_the_run_last_got_on_whenever_it_is_written(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat.json")
    heartbeat.write(Beat("training", 7, 60, at=1000.0))
    first = json.loads(heartbeat.path.read_text())
    assert {"step", "phase", "time", "iso_time", "seconds_per_step", "pid", "host"} == first.keys()
    assert (first["step"], first["phase"], first["time"], first["seconds_per_step"]) == (7, "training", 1000.0, None)
    assert first["iso_time"].startswith("1970-01-01T")
    beat = Beat("training", 11, 60, at=1002.0)
    heartbeat.write(beat)
    assert json.loads(heartbeat.path.read_text())["seconds_per_step"] == 0.5
    heartbeat.path.unlink()
    heartbeat.write(beat)  # no news
    assert list(tmp_path.iterdir()) == []


def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    Heartbeat(tmp_path / "no such folder" / "heartbeat.json").write(Beat("training", 1, 60))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_gets_on_is_left_alone_and_its_last_phase_is_written(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "heartbeat.json")
    with Watchdog(1.5, tmp_path / "stacks", 0) as watchdog:
        watchdog.heartbeat = heartbeat
        for step in range(20):  # twice the limit in all
            watchdog.beat("training", step)
            time.sleep(0.15)
        watchdog.beat("finished", 20)
    assert json.loads(heartbeat.path.read_text())["phase"] == "finished"
    assert not (tmp_path / "stacks").exists()
