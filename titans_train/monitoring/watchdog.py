"""A rank that no longer gets on ends itself, and leaves the stacks of its threads; and what monitors outside can read.

Ranks wait for each other, so one that hangs stops them all, and each that can still answer says where it stands. The
stacks are written by a thread of Python's; where the interpreter itself is stuck, faulthandler's thread, which needs no
interpreter lock, prints them to standard error. Both end the process hard: nothing is waited for.

A job that is suspended (SIGSTOP, scontrol suspend) and goes on has not hung: time in which this process did not run
does not count. The second thread cannot know of it, so it waits SUSPENDED limits longer, as collectives do; a rank
that is stuck so deeply is ended before that by its launcher, once the others have ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

PATIENCE = 3  # the limit at the start, where files are read and hashed and kernels are built, in units of the usual one
SUSPENDED = 3  # usual limits that a job may be suspended for: then collectives time out as well
_GRACE = 3.0  # seconds: for others to write their stacks before this process is missed, and for a slow disk


@dataclass(frozen=True)
class Beat:
    """phase: what has begun, after `step` steps. Seconds: limit: that it may take; at: Unix time; clock: monotonic."""

    phase: str
    step: int
    limit: float
    at: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)


class Heartbeat:
    """A file that says when the run has last got on, and where to: `time` is that of the last beat, not of writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last: Beat | None = None
        self._seconds: float | None = None  # per step

    def write(self, beat: Beat) -> None:
        """Replaces the file, if there is news. One that cannot be written is left: a full disk does not end a run."""
        last, self._last = self._last, beat
        if last is beat:
            return
        if last is not None and last.phase == beat.phase and beat.step > last.step:
            self._seconds = (beat.at - last.at) / (beat.step - last.step)
        content = {
            "step": beat.step, "phase": beat.phase, "time": beat.at,
            "iso_time": datetime.fromtimestamp(beat.at).astimezone().isoformat(), "seconds_per_step": self._seconds,
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        half = self.path.with_name(f"{self.path.name}.half")
        with suppress(OSError):
            half.write_text(json.dumps(content) + "\n")
            half.replace(self.path)


class Away:
    """Of a thread that wakes every `interval` seconds: the time in which its process did not run at all."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._beat, self._seconds = 0.0, 0.0

    def since(self, beat: float, before: float, now: float) -> float:
        """Seconds since a beat, all by the same clock; the thread woke at `before`, and then only now."""
        if beat != self._beat:
            self._beat, self._seconds = beat, 0.0
        gap = now - max(before, beat) - self.interval
        if gap > 5 * self.interval + 2:  # no busy host is so late
            self._seconds += gap
        return self._seconds


class Watchdog:
    """Within `with`, ends the process when `beat` has not been called for `seconds`.

    folder: for stacks of this start of the job, the same on all ranks, made when there are any. A rank that has been
    idle for half the limit joins when another has made it: the first to end would take the others with it.
    """

    def __init__(self, seconds: float, folder: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = seconds, folder, rank
        self.heartbeat: Heartbeat | None = None  # of the rank and from the time that may write it
        self._beat = Beat("starting", 0, seconds * PATIENCE)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._note()

    def beat(self, phase: str, step: int, patience: int = 1) -> None:
        """This rank gets on: it begins (a further part of) `phase` of a step, which may take `patience` limits."""
        self._beat = Beat(phase, step, self.seconds * patience)

    def _note(self) -> None:
        if self.heartbeat is not None:
            self.heartbeat.write(self._beat)

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        woke, away = time.monotonic(), Away(interval)
        while not self._ended.wait(interval):
            beat, before, woke = self._beat, woke, time.monotonic()
            idle = woke - beat.clock - away.since(beat.clock, before, woke)
            if idle > beat.limit or (idle > beat.limit / 2 and self.folder.exists()):
                self._end(beat, idle)
            limit = beat.limit + SUSPENDED * self.seconds
            faulthandler.dump_traceback_later(max(limit - idle, 0) + _GRACE, exit=True)
            self._note()

    def _end(self, beat: Beat, idle: float) -> None:
        faulthandler.dump_traceback_later(2 * _GRACE, exit=True)  # where the disk is what hangs
        path = self.folder / f"step-{beat.step}-rank-{self.rank}.txt"
        where = f"rank {self.rank} on {socket.gethostname()}, process {os.getpid()}, has not got on for {idle:.0f} s"
        where += f": after step {beat.step}, {beat.phase}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(f"{where}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            kept = f"the stacks of its threads are in {path}"
        except OSError as error:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            kept = f"{path} could not be written ({error})"
        sys.stderr.write(
            f"{where} (monitoring.hang_seconds {self.seconds:g}): a rank hangs or has died, or a phase takes longer "
            f"than that; {kept}. The process ends; the run goes on from its last checkpoint\n"
        )
        sys.stderr.flush()
        time.sleep(_GRACE)
        os._exit(1)
