"""Run under torchrun on 2 ranks by test_finish.py: how runs end, and how they do not where a file cannot be written.

Usage: finish_worker.py FOLDER PREPARED. Each rank says each case in a JSON line of FOLDER/found-RANK.jsonl.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from tests.training.worker import plan_of
from titans_train.data import loader
from titans_train.errors import UserError
from titans_train.monitoring import signals
from titans_train.parallel import Mesh, process_group
from titans_train.plan import Plan
from titans_train.training import loop, run_folder

STEPS = 2


def outcome(mesh: Mesh, plan: Plan) -> dict[str, Any]:
    try:
        return loop.train_on(mesh, plan)
    except UserError as error:
        return {"error": str(error), "agreed": error.agreed}
    except signals.Requeue as request:
        return {"stopped": request.step}


def summaries(mesh: Mesh, plan: Plan) -> dict[str, Any]:
    """A whole run; again; with a summary of another step; with one that is damaged."""
    path = plan.run_directory / "summary.json"
    found = [outcome(mesh, plan), outcome(mesh, plan)]
    for text in (json.dumps({"steps": STEPS - 1}), "{"):
        if mesh.is_first:
            path.write_text(text)
        found.append(outcome(mesh, plan))
    return {"found": found}


def in_the_way(mesh: Mesh, plan: Plan, *names: str) -> dict[str, Any]:
    """Folders where the run's files should be: they cannot be written, and then they can."""
    if mesh.is_first:
        for name in names:
            (plan.run_directory / name).mkdir(parents=True)
        run_folder.write(plan)
    first = outcome(mesh, plan)
    if mesh.is_first:
        for name in names:
            (plan.run_directory / name).rmdir()
    return {"found": [first, outcome(mesh, plan)]}


def early(mesh: Mesh, plan: Plan) -> dict[str, Any]:
    """A signal to the second rank before anything, and one before the first step of a run that goes on."""
    with signals.caught():
        if mesh.rank == 1:
            signal.raise_signal(signal.SIGUSR1)
        found = [outcome(mesh, plan)]
    with signals.caught():
        loop.train_on(mesh, plan, stop_after=1)

    def late(*args: Any) -> Iterator[Any]:
        if mesh.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return loader(*args)

    with signals.caught(), mock.patch.object(loop, "loader", late):
        found.append(outcome(mesh, plan))
    return {"found": found}


def main(folder: Path, prepared: Path) -> None:
    quiet = {"validate_every": None, "validation_sequences": 1, "sample_every": None, "tensorboard": False}
    with process_group() as mesh, (folder / f"found-{mesh.rank}.jsonl").open("w") as file:

        def plan(name: str) -> Plan:
            return plan_of(folder, prepared, name, 0, 2, training={"steps": STEPS}, monitoring=quiet)

        cases = {
            "summaries": summaries(mesh, plan("summaries")),
            "results": in_the_way(mesh, plan("results"), "metrics.jsonl", "summary.json", "loss.png"),
            "early": early(mesh, plan("early")),
        }
        for name, found in cases.items():
            file.write(json.dumps({"name": name, **found}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
