"""`python -m titans_train train` on real ranks without a launcher, each watched and signalled by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.torchrun import ROOT


class Ranks:
    """Started at once; killed at the end of a `with`. Each is the leader of a process group of its own."""

    def __init__(self, count: int, logs: Path, *command: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [logs / f"rank-{rank}.txt" for rank in range(count)]
        logs.mkdir(parents=True, exist_ok=True)
        self.processes = [self._start(rank, count, port, command) for rank in range(count)]

    def _start(self, rank: int, count: int, port: int, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        with self.logs[rank].open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *command], env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def text(self, rank: int = 0) -> str:
        return self.logs[rank].read_text("utf-8", errors="replace")

    def signal(self, number: int, ranks: list[int], whole_group: bool = False) -> None:
        for rank in ranks:
            pid = self.processes[rank].pid
            os.killpg(pid, number) if whole_group else os.kill(pid, number)

    def until(self, condition: Callable[[], object], limit: float = 120) -> None:
        """Waits for it. AssertionError with what the ranks have said, when it takes too long or a rank has ended."""
        end = time.monotonic() + limit
        while not condition():
            running = all(process.poll() is None for process in self.processes)
            assert running and time.monotonic() < end, "\n".join(self.text(r)[-3000:] for r in range(len(self.logs)))
            time.sleep(0.05)

    def statuses(self, limit: float = 120) -> list[int]:
        """Exit status of each rank."""
        return [process.wait(timeout=limit) for process in self.processes]
