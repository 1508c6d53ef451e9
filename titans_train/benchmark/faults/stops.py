"""Signals that ask a run to stop, and a rank that is stopped itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

from titans_train.benchmark.faults.lab import Lab, dice
from titans_train.benchmark.faults.run import LAYOUTS, RANKS, STEPS
from titans_train.benchmark.faults.trial import Trial

_REQUEUE = 75
_HANG_SECONDS = 6


def signals(lab: Lab) -> Iterator[Trial]:
    """Three signals to one rank, to all, to the launcher: the job has to save and to ask to be started again."""
    layouts = list(LAYOUTS)
    kinds = [(number, to) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2)
             for to in ("the launcher", "one rank", "all ranks")]  # fmt: skip
    for turn, (number, to) in enumerate(kinds[:1] if lab.quick else kinds):
        chance, layout = dice("signal", turn), layouts[turn % len(layouts)]
        step, rank = chance.randrange(1, STEPS - 2), chance.randrange(RANKS)
        lab.reference(layout)
        trial = lab.new_run("signal", layout)
        job = lab.start(trial)
        job.wait_logged(trial.folder, step)
        ranks = job.ranks()
        to_whom = {"the launcher": [job.process.pid], "one rank": [ranks[rank]], "all ranks": list(ranks.values())}
        since = job.signal(number, *to_whom[to])
        who = f"rank {rank}" if to == "one rank" else to
        case = f"{layout}: {number.name} to {who} after step {step}"
        yield lab.outcome(trial, case, since, statuses=[_REQUEUE])


def frozen(lab: Lab) -> Iterator[Trial]:
    """SIGSTOP to a rank: the others have to notice, save where they stand, and end the job with it."""
    layouts = list(LAYOUTS)
    for turn in range(1 if lab.quick else 4):
        chance, layout = dice("frozen", turn), layouts[turn]
        step, rank, pause = chance.randrange(1, STEPS - 2), chance.randrange(RANKS), chance.random() * 0.1
        lab.reference(layout)
        trial = lab.new_run("frozen", layout, f"monitoring.hang_seconds={_HANG_SECONDS}")
        job = lab.start(trial)
        job.wait_logged(trial.folder, step)
        time.sleep(pause)
        since = job.signal(signal.SIGSTOP, job.ranks()[rank])
        job.wait_end()
        seconds = time.monotonic() - since
        stacks = [path for path in (trial.folder / "stacks").rglob("*") if path.is_file() and path.stat().st_size]
        broken = "" if stacks else "no rank saved its stacks"
        case = f"{layout}: rank {rank} after step {step}; hang_seconds {_HANG_SECONDS}; {len(stacks)} files of stacks"
        yield lab.outcome(trial, case, since, seconds=seconds, broken=broken)
