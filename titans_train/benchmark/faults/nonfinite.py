"""Numbers that are none in one rank's loss or gradient: the step is passed over, or ends the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import FIRST, LAYOUTS
from titans_train.benchmark.faults.trial import Trial

_STEP = 5


def nonfinite(lab: Lab) -> Iterator[Trial]:
    """NaN in step 5 of one rank. Compared with the run whose optimiser is not called in that step.

    The figures of that step itself are apart: its loss or gradient norm is NaN.
    """
    layouts = [FIRST] if lab.quick else list(LAYOUTS)
    for turn, layout in enumerate(layouts):
        for what in ["gradient"] if lab.quick else ["gradient", "loss"]:
            rank = (turn + 1) % 2
            case = f"{layout}: NaN in the {what} of rank {rank}, step {_STEP}: passed over"
            yield lab.attempt(case, partial(_passed_over, lab, layout, case, rank, what))
    if not lab.quick:
        case = f"{FIRST}: NaN in the gradient of rank 1, step {_STEP}, training.skip_nonfinite=0: the run ends"
        yield lab.attempt(case, partial(_none_allowed, lab, case))


def _passed_over(lab: Lab, layout: str, case: str, rank: int, what: str) -> Trial:
    trial = lab.new_run("nan", layout)
    job = lab.start(trial, {"nan": {"step": _STEP, "rank": rank, "what": what}})
    job.wait_logged(trial.folder, _STEP)
    since = time.monotonic()
    broken = "" if list((trial.folder / "nonfinite").glob("*")) else "no file says what was passed over"
    reference = lab.reference(layout, withhold=_STEP)
    return lab.outcome(
        trial, case, since, seconds=None, statuses=[0], reference=reference, apart=[_STEP], broken=broken
    )


def _none_allowed(lab: Lab, case: str) -> Trial:
    """With none allowed the run ends; the fault gone, it goes on from the last checkpoint as if nothing had been."""
    trial = lab.new_run("nan", FIRST, "training.skip_nonfinite=0")
    job = lab.start(trial, {"nan": {"step": _STEP, "rank": 1, "what": "gradient"}})
    job.wait_logged(trial.folder, _STEP - 1)
    since = time.monotonic()
    return lab.outcome(trial, case, since, statuses=[2], found="skip_nonfinite")
