"""Starts the ranks of this host and sees them to their end. torchrun would eat their exit code and their signals.

Usage: ranks.py --processes N [--nodes M --node-rank R --address HOST --port PORT] [--log-dir DIR] -- COMMAND ...

Every rank runs COMMAND with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and dies with
this process. SIGTERM, SIGUSR1 and SIGUSR2 go on to every rank; SIGINT and SIGHUP as SIGTERM; a second SIGINT ends all.

Exit status: 0 if every rank ends with 0; 75 if every rank ends with 0 or 75 ("start me again", sysexits' EX_TEMPFAIL);
else that of the first rank that ends otherwise, as a shell states it (128 + number of a signal).
"""

# ruff: noqa: E402  # signals are kept back before the rest is imported

from __future__ import annotations

import signal

RELAYED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
AS_TERM = (signal.SIGINT, signal.SIGHUP)
# What was blocked before; a signal that comes from here on waits until `Ranks.run` takes it.
MASK = signal.pthread_sigmask(signal.SIG_BLOCK, (*RELAYED, *AS_TERM) if __name__ == "__main__" else ())

import argparse
import ctypes
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from ports import claim_port, is_free
from rank_logs import keep_logs

REQUEUE = 75
PR_SET_PDEATHSIG = 1
GRACE = 5.0  # seconds for the others once a rank ended badly: they may be writing where they stood


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]

    def __str__(self) -> str:
        return f"rank {self.number} (pid {self.process.pid})"

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None


def say(text: str) -> None:
    sys.stderr.write(f"launcher: {text}\n")
    sys.stderr.flush()


def environment(options: argparse.Namespace, local_rank: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    defaults = {"OMP_NUM_THREADS": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    return defaults | inherited | {
        "RANK": str(options.node_rank * options.processes + local_rank),
        "WORLD_SIZE": str(options.nodes * options.processes),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(options.processes),
        "MASTER_ADDR": options.address,
        "MASTER_PORT": str(options.port),
    }  # fmt: skip


class Ranks:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.heard = {s for s in (*RELAYED, *AS_TERM) if signal.getsignal(s) != signal.SIG_IGN}  # nohup stays nohup
        self.relayed: set[int] = set()
        self.interrupts = 0
        self.first: Rank | None = None  # to end
        self.deadline: float | None = None  # for the others, from the first end on
        self.status: int | None = None  # decided by the first bad end
        self.copies: list[threading.Thread] = []
        self.all: list[Rank] = []

    def start(self) -> None:
        """Signals are kept back and taken in `run`: none is lost, none comes in between."""
        signal.pthread_sigmask(signal.SIG_BLOCK, self.heard | {signal.SIGCHLD})
        parent, prctl = os.getpid(), getattr(ctypes.CDLL(None), "prctl", None)

        def in_child() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, MASK)
            if prctl is not None:
                prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)  # it died before the line above

        output = subprocess.PIPE if self.options.log_dir else None
        for local_rank in range(self.options.processes):
            variables = environment(self.options, local_rank)
            process = subprocess.Popen(
                self.options.command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                process_group=0, preexec_fn=in_child,
            )  # fmt: skip
            self.all.append(Rank(int(variables["RANK"]), process))
        if self.options.log_dir:
            self.copies = keep_logs(self.options.log_dir, {rank.number: rank.process for rank in self.all})

    def run(self) -> int:
        """Until all have ended; the exit status."""
        while running := [rank for rank in self.all if not rank.ended]:
            self._judge([rank for rank in self.all if rank not in running])
            if self.deadline is not None and time.monotonic() > self.deadline:
                self._end_late(running)
            self._take_signal()
        self._judge(self.all)
        for thread in self.copies:
            thread.join(GRACE)
        return self.status if self.status is not None else max(self._code(rank) for rank in self.all)

    def _code(self, rank: Rank) -> int:
        """As a shell states it, but REQUEUE for a rank whose signal came before it could hear it: nothing is lost."""
        code = rank.process.returncode
        return code if code >= 0 else REQUEUE if -code in self.relayed else 128 - code

    def _judge(self, ended: list[Rank]) -> None:
        """From the first bad end, or the first end at all, counts the time that the others have left.

        A rank that a signal ended before it could hear it decides too: what ends badly beside it misses it.
        """
        if self.status is not None:
            return
        bad = [rank for rank in ended if self._code(rank) not in (0, REQUEUE)]
        if any(rank.process.returncode < 0 and self._code(rank) == REQUEUE for rank in ended):
            self.status, self.deadline = REQUEUE, time.monotonic() + GRACE
        elif bad:
            self.status, self.deadline = self._code(bad[0]), time.monotonic() + GRACE
            code = bad[0].process.returncode
            how = f"ended with exit code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
            say(f"{bad[0]} {how}" + ("; the others are ended" if len(ended) < len(self.all) else ""))
        elif ended and self.first is None:
            self.first, self.deadline = ended[0], time.monotonic() + self.options.end_seconds

    def _end_late(self, running: list[Rank]) -> None:
        if self.status is None:
            self.status = 1
            names = ", ".join(map(str, running))
            say(f"{names} did not end within {self.options.end_seconds:g} s of {self.first}; ended now")
        self._kill(running)

    def _kill(self, ranks: list[Rank]) -> None:
        """With the processes they started. SIGTERM would mean "save" to them, and a stopped one would not hear it."""
        for rank in ranks:
            if not rank.ended:
                os.killpg(rank.process.pid, signal.SIGKILL)
                rank.process.wait()

    def _take_signal(self) -> None:
        """Waits up to a second for one: a child's end wakes it."""
        taken = signal.sigtimedwait(self.heard | {signal.SIGCHLD}, 1.0)
        if taken is None or taken.si_signo == signal.SIGCHLD:
            return
        number = signal.Signals(taken.si_signo)
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            say("interrupted twice: every rank is ended now")
            self.status = 128 + signal.SIGINT
            return self._kill(self.all)
        passed_on = signal.SIGTERM if number in AS_TERM else number
        self.relayed.add(passed_on)
        say(f"{number.name}: every rank is told to save and stop")
        for rank in self.all:
            rank.process.send_signal(passed_on)  # nothing happens to one that has ended


def main(arguments: list[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, command = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(usage="ranks.py --processes N [options] -- COMMAND ...", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="on this host")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--address", default="127.0.0.1", help="of node 0")
    parser.add_argument("--port", type=int, help="of node 0; needed with several nodes (default: a free one)")
    parser.add_argument("--log-dir", type=Path, help="what each rank says also goes into start-N-rank-R.log there")
    parser.add_argument("--end-seconds", type=float, default=600, help="between the first rank's end and the last's")
    options = parser.parse_args(own)
    options.command = command
    if not command or options.processes < 1 or (options.nodes > 1 and options.port is None):
        parser.error("COMMAND after --, --processes from 1 up, and with several nodes --address and --port are needed")
    claim = None
    try:
        if options.port is None:
            options.port, claim = claim_port()
        elif options.node_rank == 0 and not is_free(options.port):
            raise OSError(f"port {options.port} is in use on this host: another run, or a rest of one?")
        ranks = Ranks(options)
        ranks.start()
    except OSError as error:
        sys.exit(f"error: {command[0]} cannot be started: {error}")
    try:
        return ranks.run()
    finally:
        if claim is not None:
            claim.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
