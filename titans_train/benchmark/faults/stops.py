"""Signals that ask a run to stop, and a rank that is stopped itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial

from titans_train.benchmark.faults.lab import Lab, dice
from titans_train.benchmark.faults.run import EVERY, LAYOUTS, RANKS, STEPS
from titans_train.benchmark.faults.trial import Trial

_REQUEUE = 75
_HANG_SECONDS = 6
_NEVER = 100 * STEPS


def signals(lab: Lab) -> Iterator[Trial]:
    """Three signals to one rank, to all, to the launcher: the job has to save and to ask to be started again.

    Every other run has no checkpoint but the signal's own. In the others a signal may come in the middle of a save.
    """
    layouts = list(LAYOUTS)
    kinds = [(number, to) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2)
             for to in ("the launcher", "one rank", "all ranks")]  # fmt: skip
    for turn, (number, to) in enumerate(kinds[:1] if lab.quick else kinds):
        chance, layout = dice("signal", turn), layouts[turn % len(layouts)]
        every = EVERY if turn % 2 else _NEVER
        step = chance.choice([step for step in range(1, STEPS - 2) if step % EVERY == 1])
        rank = chance.randrange(RANKS)
        who = f"rank {rank}" if to == "one rank" else to
        case = f"{layout}: {number.name} to {who} after step {step}; " + (
            "nothing else saves" if every == _NEVER else f"a save every {every} steps"
        )
        yield lab.attempt(case, partial(_signal, lab, layout, case, number, to, step, rank, every))


def _signal(lab: Lab, layout: str, case: str, number: int, to: str, step: int, rank: int, every: int) -> Trial:
    lab.reference(layout)
    trial = lab.new_run("signal", layout, f"checkpoint.every={every}")
    job = lab.start(trial)
    job.wait_logged(trial.folder, step)
    if to == "the launcher":
        pids = [job.process.pid]
    else:
        pids = [job.rank(rank)] if to == "one rank" else [job.rank(each) for each in range(RANKS)]
    since = job.signal(number, *pids)
    return lab.outcome(trial, case, since, statuses=[_REQUEUE], lost_at_most=0)


def frozen(lab: Lab) -> Iterator[Trial]:
    """SIGSTOP to a rank: the others have to notice, keep their stacks and end the job with it. Nothing is saved."""
    layouts = list(LAYOUTS)
    for turn in range(1 if lab.quick else 4):
        chance, layout = dice("frozen", turn), layouts[turn]
        step, rank, pause = chance.randrange(1, STEPS - 2), chance.randrange(RANKS), chance.random() * 0.1
        case = f"{layout}: rank {rank} after step {step}; hang_seconds {_HANG_SECONDS}"
        yield lab.attempt(case, partial(_freeze, lab, layout, case, step, rank, pause))


def _freeze(lab: Lab, layout: str, case: str, step: int, rank: int, pause: float) -> Trial:
    lab.reference(layout)
    trial = lab.new_run("frozen", layout, f"monitoring.hang_seconds={_HANG_SECONDS}")
    job = lab.start(trial)
    job.wait_logged(trial.folder, step)
    time.sleep(pause)
    since = job.signal(signal.SIGSTOP, job.rank(rank))
    job.wait_end()
    seconds = time.monotonic() - since
    broken = []
    for other in set(range(RANKS)) - {rank}:
        stacks = (trial.folder / "stacks").glob(f"*/*-rank-{other}.txt")
        if not any("File " in path.read_text() for path in stacks):
            broken.append(f"the stacks of rank {other} were not kept")
    if job.status == 0:
        broken.append("ended with 0")
    return lab.outcome(trial, case, since, seconds=seconds, broken="; ".join(broken))
