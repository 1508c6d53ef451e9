"""The file for monitors outside, and what a watchdog does not do. tests/training/test_hangs.py has real hangs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.torchrun import ROOT
from titans_train.monitoring.watchdog import Away, Beat, Heartbeat, Watchdog


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


IDLE = """
import sys, time
from pathlib import Path
from titans_train.monitoring.watchdog import Watchdog
with Watchdog(2, Path(sys.argv[1]), 0) as watchdog:
    watchdog.beat("training", 1)
    print("on", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_a_process_that_was_suspended_goes_on_and_a_hang_after_that_is_still_seen(tmp_path: Path) -> None:
    """Suspended for twice its limit; one then gets on in time, the other does not."""
    command = [sys.executable, "-c", IDLE, str(tmp_path / "stacks")]
    processes = [
        subprocess.Popen([*command, seconds], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
        for seconds in ("0.5", "60")
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"on\n"
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    for process, status in zip(processes, (0, 1), strict=True):
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == status, error
    assert [path.name for path in (tmp_path / "stacks").iterdir()] == ["step-1-rank-0.txt"]


def test_only_time_in_which_the_process_did_not_run_is_away() -> None:
    away = Away(1.0)
    assert [away.since(0.0, now - 1.0, now) for now in (1.0, 2.0, 3.0)] == [0, 0, 0]
    assert away.since(0.0, 3.0, 9.0) == 0  # late, as on a busy host
    assert away.since(0.0, 9.0, 30.0) == 20.0
    assert away.since(0.0, 30.0, 50.0) == 39.0
    assert away.since(49.5, 50.0, 51.0) == 0  # the next beat counts from its own time
