"""A job in processes of its own, watched and struck from outside: by its files, its console and /proc."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_train.monitoring.metrics import read_metrics

ROOT = Path(__file__).parents[3]
LAUNCHER = ROOT / "launchers" / "ranks.py"
MARK = "TITANS_FAULT_TRIAL"
POLL_SECONDS = 0.003
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIMIT_SECONDS = 150.0  # nothing that is waited for takes longer on a busy machine


def _end_with_parent() -> None:
    """Runs in a job's first process: nothing of it is left when the benchmark itself is ended, however that is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    environment: dict[str, str]


class Job:
    """Started at once. Every process of it carries a mark in its environment, so that none is missed."""

    def __init__(self, command: Sequence[str], console: Path, **environment: str) -> None:
        self.console, self._mark = console, uuid.uuid4().hex
        self.started, self.stayed = time.monotonic(), False
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        with console.open("ab") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=_end_with_parent, env={**inherited, **ours, **environment, MARK: self._mark},
            )  # fmt: skip

    def processes(self) -> list[Process]:
        """All that run now, the launcher, ranks, readers and what they started."""
        found, mark = [], f"{MARK}={self._mark}".encode()
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            try:
                content = Path(entry.path, "environ").read_bytes()
                if mark not in content:
                    continue
                state, parent = Path(entry.path, "stat").read_bytes().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state != b"Z":
                pairs = (line.split("=", 1) for line in content.decode("utf-8", "replace").split("\0") if "=" in line)
                found.append(Process(int(entry.name), int(parent), {key: value for key, value in pairs}))
        return found

    def ranks(self) -> dict[int, int]:
        """Process id of each rank."""
        launched = (p for p in self.processes() if p.parent == self.process.pid and "RANK" in p.environment)
        return {int(p.environment["RANK"]): p.pid for p in launched}

    def rank(self, number: int) -> int:
        """Process id of one rank. RuntimeError: it is not there, so nothing can be done to it."""
        ranks = self.ranks()
        if number not in ranks:
            raise RuntimeError(f"the fault was not injected: rank {number} was already gone: {self.complaint()}")
        return ranks[number]

    def signal(self, number: int, *pids: int) -> float:
        """Sends it to all of `pids`; the time of it."""
        now = time.monotonic()
        for pid in pids:
            assert pid > 1, "a process, not a group of them or all"
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        return now

    def wait_for(self, condition: Callable[[], bool], seconds: float = LIMIT_SECONDS) -> bool:
        """Whether it came to hold before the launcher ended and the time was over."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return condition()
            time.sleep(POLL_SECONDS)
        return True

    def wait_logged(self, run: Path, step: int) -> bool:
        """Until the run's metrics have a line of `step` or a later one."""
        return self.wait_for(lambda: last_step(run) >= step)

    def wait_end(self, seconds: float = LIMIT_SECONDS) -> bool:
        """Whether every process ended by itself; what did not is killed, and the answer stays no."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None or self.processes():
            if time.monotonic() > deadline:
                self.stayed = True
                self.kill()
            time.sleep(0.02)
        return not self.stayed

    def kill(self) -> None:
        """Ends all processes, as a power cut would."""
        while left := self.processes():
            self.signal(signal.SIGKILL, *(p.pid for p in left))
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()

    @property
    def status(self) -> int | None:
        """Exit status as a shell states it; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code

    def text(self) -> str:
        return self.console.read_text("utf-8", errors="replace")

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.text()) is not None

    def resumed_from(self) -> int | None:
        """The step before the first one that it trained; None: it trained none."""
        first = re.search(r"^\r?step (\d+)/", self.text(), re.MULTILINE)
        return None if first is None else int(first[1]) - 1

    def complaint(self) -> str:
        """Its own line that says most about why it ended."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"rror|refus|damage|set aside|another job", line)]
        return (telling or lines or [""])[-1][:300]


def training(ranks: int, config: Path, settings: Sequence[str], *wrapped: str) -> list[str]:
    """The command that a user gives, again and again. `wrapped`: what stands in for the trainer's own module."""
    module = wrapped or ("-m", "titans_train")
    return [
        sys.executable, str(LAUNCHER), "--processes", str(ranks), "--end-seconds", "30", "--", sys.executable, *module,
        "train", str(config), *settings,
    ]  # fmt: skip


def last_step(run: Path) -> int:
    """The last step in the run's metrics; 0 before the first."""
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line), default=0)
