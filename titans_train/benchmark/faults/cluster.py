"""Faults that SLURM brings: a node that is lost, a job that gives way. On a real SLURM of three nodes on this machine.

The cluster is the one of the project's tests (tests/slurm/cluster.py); the job is what `submit` hands in.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from titans_train.benchmark.faults.job import LIMIT_SECONDS, ROOT, last_step
from titans_train.benchmark.faults.lab import Lab, Unavailable
from titans_train.benchmark.faults.run import EVERY, STEPS, Contents, Reference, contents, figures
from titans_train.benchmark.faults.trial import Trial

_FILE = ROOT / "tests" / "slurm" / "cluster.py"
_LAYOUT = "tensor 2"
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")


@contextmanager
def _slurm(lab: Lab) -> Iterator[Any]:
    """A cluster of three nodes. Unavailable: there is no SLURM here, or not the project's tests."""
    if not _FILE.exists():
        raise RuntimeError("the tests of the project, which bring a SLURM up, are not here; run it in a checkout")
    found = importlib.util.spec_from_file_location("slurm_cluster", _FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    if missing := module.missing_programs():
        raise Unavailable(f"SLURM is not installed (no {', '.join(missing)})")
    place = lab.folder / f"slurm-{len(list(lab.folder.glob('slurm-*')))}"
    with module.SlurmCluster(place) as cluster:
        cluster.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        yield cluster


class Submitted:
    """A training on two nodes, a rank on each."""

    def __init__(self, lab: Lab, cluster: Any, *settings: str) -> None:
        self.cluster, self.trial = cluster, lab.new_run("slurm", _LAYOUT, *settings)
        self.folder = lab.folder / f"submitted-{self.trial.name}"
        self.folder.mkdir()
        layout = ["--nodes", "2", "--cpu", "--ranks-per-node", "1", "--cpus", "2", "--no-preflight"]
        command = [sys.executable, "-m", "titans_train", "submit", str(lab.config()), *self.trial.settings, *layout]
        said = cluster.run(*command, cwd=self.folder).stdout
        self.number = re.findall(r"submitted job (\d+)", said)[0]
        self.gone = 0.0  # when its first start had ended
        self.before, self.whole = 0, Contents()  # last step and checkpoints, before its second start

    @property
    def run(self) -> Path:
        return self.trial.folder

    def wait_step(self, step: int) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while last_step(self.run) < step and time.monotonic() < deadline:
            time.sleep(0.02)

    def wait_again(self) -> None:
        """Until SLURM has taken the job from its nodes, and until it has started it again."""
        self._wait(lambda job: job["Restarts"] != "0" or job["JobState"] not in ("RUNNING", "COMPLETING"))
        self.gone = time.monotonic()
        self._wait(lambda job: job["JobState"] in (_ENDED if job["Restarts"] == "0" else (*_ENDED, "RUNNING")))
        self.before, self.whole = last_step(self.run), contents(self.run)

    def _wait(self, condition: Callable[[dict[str, str]], bool]) -> None:
        """On SLURM's fields of the job; where it does not answer for once, it is asked again."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not ((job := self.cluster.hurry(self.number)) and condition(job)) and time.monotonic() < deadline:
            time.sleep(0.1)

    def output(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.out"))

    def outcome(self, case: str, since: float, reference: Reference, lost_at_most: int | None = None) -> Trial:
        job = self.cluster.wait_job(self.number, timeout=2 * LIMIT_SECONDS)
        wrong = []
        if job["JobState"] != "COMPLETED" or job["Restarts"] == "0":
            wrong.append(f"{job['JobState']} after {job['Restarts']} restarts: {self.output()[-300:]}")
        mine, theirs = figures(self.run), reference.figures
        if other := [key for key in sorted(theirs.keys() | mine.keys()) if mine.get(key) != theirs.get(key)]:
            wrong.append(f"{other[0][1]} of step {other[0][0]} is another")
        logs = sorted(self.folder.glob("logs/*/r[1-9]*-rank-0.log"))
        starts = [int(n) - 1 for log in logs for n in re.findall(r"^step (\d+)/", log.read_text(), re.MULTILINE)[:1]]
        lost = max(self.before - starts[0], 0) if starts else None
        if lost is None:
            wrong.append("trained nothing after its restart")
        elif lost_at_most is not None and lost > lost_at_most:
            wrong.append(f"{lost} steps lost, not {lost_at_most}")
        partial = int(
            bool(starts) and starts[0] > 0 and self.whole.get(starts[0]) != reference.checkpoints.get(starts[0])
        )
        return Trial(case, not wrong and not partial, lost, self.gone - since, "; ".join(wrong), partial)


def lost_node(lab: Lab) -> Iterator[Trial]:
    """Power cut: SLURM misses the node after 10 s (SlurmdTimeout), requeues the job, and gives it the spare one."""
    reference = lab.reference(_LAYOUT)
    with _slurm(lab) as cluster:
        for turn, node in enumerate(["node2"] if lab.quick else ["node2", "node1"]):
            first = "with the batch script" if node == "node1" else "the second"
            case = f"{_LAYOUT}: {node} of two, {first}"
            yield lab.attempt(case, partial(_lose, lab, cluster, case, node, EVERY + 1 + turn, reference))
            cluster.start_node(node)
            cluster.wait_nodes()


def _lose(lab: Lab, cluster: Any, case: str, node: str, step: int, reference: Reference) -> Trial:
    training = Submitted(lab, cluster)
    training.wait_step(step)
    since = time.monotonic()
    cluster.crash_node(node)
    training.wait_again()
    return training.outcome(case, since, reference)


def preempted(lab: Lab) -> Iterator[Trial]:
    """A job of a higher partition takes all nodes; when it has ended, the training goes on.

    There is no checkpoint but the one that SLURM's notice asks for, so a run that does not heed it loses all.
    """
    reference = lab.reference(_LAYOUT)
    with _slurm(lab) as cluster:
        case = f"{_LAYOUT}: by a partition of higher priority; nothing else saves"
        yield lab.attempt(case, partial(_give_way, lab, cluster, case, reference))


def _give_way(lab: Lab, cluster: Any, case: str, reference: Reference) -> Trial:
    training = Submitted(lab, cluster, f"checkpoint.every={100 * STEPS}")
    training.wait_step(EVERY + 1)
    since = time.monotonic()
    urgent = ["--partition=high", "--nodes=3", "--cpus-per-task=4", "--output=/dev/null", "--wrap=sleep 1"]
    cluster.sbatch(*urgent)
    training.wait_again()
    return training.outcome(case, since, reference, lost_at_most=0)
