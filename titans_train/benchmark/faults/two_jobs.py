"""Two jobs in one run folder: one trains, the other is refused and changes nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from functools import partial

from titans_train.benchmark.faults.job import Job
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import EVERY, LAYOUTS, RANKS, TrialRun
from titans_train.benchmark.faults.trial import Trial

_REFUSED = "another job trains in"


def two_jobs(lab: Lab) -> Iterator[Trial]:
    """The second started in the middle of the first, on its own layout and another; both at once; after a kill."""
    lab.reference()
    case = "the second started while the first trains"
    yield lab.attempt(case, partial(_second, lab, case))
    if lab.quick:
        return
    case = "the second started on another layout while the first trains"
    yield lab.attempt(case, partial(_second, lab, case, *LAYOUTS["tensor 2"]))
    yield lab.attempt("both started at once", partial(_both_at_once, lab))
    yield lab.attempt("the launcher killed", partial(_after_a_kill, lab))


def _beside(lab: Lab, trial: TrialRun, *settings: str) -> Job:
    """Another job in the folder of a trial."""
    second = TrialRun(f"{trial.name}-second", trial.layout, trial.folder, (*trial.settings, *settings))
    return lab.start(second)


def _refusal(job: Job) -> str:
    if not job.wait_end():
        return "the second job did not end"
    if job.status != 2 or not job.says(_REFUSED):
        return f"the second job ended with {job.status}: {job.complaint()}"
    return ""


def _second(lab: Lab, case: str, *settings: str) -> Trial:
    """The first runs long enough for the second to come to the folder: it is frozen meanwhile."""
    trial = lab.new_run("two")
    job = lab.start(trial)
    job.wait_logged(trial.folder, EVERY + 1)
    ranks = [job.rank(number) for number in range(RANKS)]
    job.signal(signal.SIGSTOP, *ranks)
    since = time.monotonic()
    refusal = _refusal(_beside(lab, trial, *settings))
    seconds = time.monotonic() - since
    job.signal(signal.SIGCONT, *ranks)
    return lab.outcome(trial, case, since, seconds=seconds, statuses=[0], broken=refusal)


def _both_at_once(lab: Lab) -> Trial:
    """Whichever comes first trains."""
    trial = lab.new_run("two")
    since = time.monotonic()
    first, second = lab.start(trial), _beside(lab, trial)
    first.wait_end()
    second.wait_end()
    refused, other = (first, second) if first.status != 0 else (second, first)
    refusal = _refusal(refused) if other.status == 0 else f"ended with {first.status} and {second.status}"
    return lab.outcome(trial, "both started at once", since, seconds=None, broken=refusal)


def _after_a_kill(lab: Lab) -> Trial:
    """Started again without waiting for what is left of the first: refused or not, it trains in the end."""
    trial = lab.new_run("two")
    job = lab.start(trial)
    job.wait_logged(trial.folder, EVERY + 1)
    since = job.signal(signal.SIGKILL, job.process.pid)
    lab.start(trial)
    broken = "" if job.wait_end() else "ranks of the killed launcher stayed"
    case = "the launcher killed, and the same command given at once"
    return lab.outcome(trial, case, since, seconds=None, broken=broken)
