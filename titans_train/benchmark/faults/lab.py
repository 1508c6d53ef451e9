"""Where faults are injected: a tiny run on two processes, what it gives when nothing happens, and what came of a fault.

On the same layout training is bit for bit the same on a CPU, so what was lost or read wrong shows in the losses.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from titans_train.benchmark.faults.job import ROOT, Job, last_step, training
from titans_train.benchmark.faults.run import (
    EVERY,
    FIRST,
    LAYOUTS,
    RANKS,
    Reference,
    Start,
    TrialRun,
    config_of,
    contents,
    figures,
    per_step,
)  # fmt: skip
from titans_train.benchmark.faults.trial import Trial
from titans_train.monitoring.metrics import read_metrics

UNTIL_END = -1.0  # seconds to detect are counted until no process was left
_TRIES = 4  # of the same command
_OBSERVED = ("-m", "titans_train.benchmark.faults.observed")
T = TypeVar("T")


class Unavailable(Exception):
    """A fault cannot be injected on this machine, and why."""


class Lab:
    """A folder for everything. `quick`: few trials. `seeds`: of the random kills."""

    def __init__(self, folder: Path, quick: bool = False, seeds: int = 20) -> None:
        self.folder, self.quick, self.seeds = folder, quick, seeds
        self.runs, self.consoles = folder / "runs", folder / "consoles"
        self._made: dict[tuple[object, ...], Any] = {}
        self._jobs: list[Job] = []
        self._count = 0
        self.runs.mkdir(parents=True, exist_ok=True)
        self.consoles.mkdir(exist_ok=True)

    @property
    def tiny_steps(self) -> int:
        """Of the long run."""
        return 1_000 if self.quick else 10_000

    # ---- what trials share, made when it is first needed

    def once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def prepared(self, compression: str = "zstd") -> Path:
        """Data in many shards."""
        return self.once(("prepared", compression), lambda: self._prepare(compression))

    def _prepare(self, compression: str) -> Path:
        from titans_train.benchmark.data import write_pieces

        texts, output = self.folder / "texts.jsonl", self.folder / f"prepared-{compression}"
        if not texts.exists():
            write_pieces(texts, 1 << 20)
        options = ["--shard-size", "32kb", "--compression", compression, "--workers", "1"]
        command = [sys.executable, "-m", "data_prep", "--input", str(texts), "--output", str(output), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        return output

    def config(self) -> Path:
        def write() -> Path:
            path = self.folder / "run.yaml"
            path.write_text(yaml.safe_dump(config_of(self.prepared(), self.runs)))
            return path

        return self.once(("config",), write)

    def reference(self, layout: str = FIRST, *settings: str, withhold: int = 0) -> Reference:
        """The run that nothing happens to; but the update of step `withhold` is not made, if that is given."""
        return self.once(("reference", layout, settings, withhold), lambda: self._refer(layout, settings, withhold))

    def _refer(self, layout: str, settings: Sequence[str], withhold: int) -> Reference:
        saves = ["checkpoint.every=1", "checkpoint.keep=100"]  # whatever step a trial goes on from
        own = any(setting.startswith("checkpoint.") for setting in settings)
        trial = self.new_run("reference", layout, *settings, *([] if own else saves))
        job = self.start(trial, {"withhold": {"step": withhold}} if withhold else {})
        if not job.wait_end() or job.status != 0:
            raise RuntimeError(f"the uninterrupted run of {layout} failed:\n{job.text()[-3000:]}")
        files = {rank: self.notes(job, "files", rank) for rank in range(RANKS)}
        return Reference(trial.folder, figures(trial.folder), contents(trial.folder), self._given(job), files)

    def base(self, layout: str = FIRST) -> Path:
        """A run that a power cut ended right after its second checkpoint; it has both."""

        def cut() -> Path:
            trial = self.new_run("base", layout)
            job = self.start(trial)
            if not job.wait_for(lambda: last_step(trial.folder) > 2 * EVERY and 2 * EVERY in contents(trial.folder)):
                raise RuntimeError(f"a run of {layout} failed:\n{job.text()[-3000:]}")
            job.kill()
            metrics = trial.folder / "metrics.jsonl"  # of what came after the checkpoint nothing is left, or counted
            lines = [line for line in read_metrics(metrics) if line["step"] <= 2 * EVERY]
            metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            return trial.folder

        return self.once(("base", layout), cut)

    # ---- one trial

    def new_run(self, name: str, layout: str = FIRST, *settings: str, start: Path | None = None) -> TrialRun:
        """A run folder that is not there yet; or a copy of `start`, to go on from."""
        self._count += 1
        name = f"{name}-{self._count}"
        folder = self.runs / name
        if start is not None:
            shutil.copytree(start, folder)
        return TrialRun(name, layout, folder, (*LAYOUTS[layout], f"run.name={name}", *settings))

    def attempt(self, case: str, make: Callable[[], Trial]) -> Trial:
        """A trial. One that breaks off is not survived, whatever the reason; its jobs are ended."""
        first = len(self._jobs)
        try:
            return make()
        except Unavailable:
            raise
        except Exception as error:  # a trial never takes the others with it
            told = f"{error}" if isinstance(error, RuntimeError) else traceback.format_exc()
            return Trial(case, False, note=told)
        finally:
            for job in self._jobs[first:]:
                job.kill()

    def start(self, trial: TrialRun, watch: dict[str, Any] | None = None) -> Job:
        """The user's command; under `observed` where a fault needs a place in the program, or batches are compared."""
        name = f"{trial.name}-{len(trial.starts)}"
        wrapped: Sequence[str] = ()
        if watch is not None:
            path = self.consoles / f"{name}.watch"
            whole = {"notes": str(self.consoles / f"{name}.notes"), "checkpoints": str(trial.folder / "checkpoints")}
            path.write_text(json.dumps({**whole, "per_step": per_step(trial.layout), **watch}))
            wrapped = (*_OBSERVED, str(path))
        before, whole_ones = last_step(trial.folder), contents(trial.folder)
        job = Job(self.command(trial, wrapped), self.consoles / f"{name}.txt")
        self._jobs.append(job)
        trial.starts.append(Start(job, before, whole_ones))
        return job

    def command(self, trial: TrialRun, wrapped: Sequence[str]) -> list[str]:
        return training(RANKS, self.config(), trial.settings, *wrapped)

    def notes(self, job: Job, kind: str, rank: int) -> list[dict[str, Any]]:
        path = job.console.with_suffix(".notes") / f"{kind}-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def _given(self, job: Job) -> dict[int, list[str]]:
        return {rank: [note["digest"] for note in self.notes(job, "steps", rank)] for rank in range(RANKS)}

    def outcome(
        self,
        trial: TrialRun,
        case: str,
        since: float,
        *,
        seconds: float | None = UNTIL_END,
        statuses: Sequence[int] | None = None,
        found: str | None = None,
        mend: Callable[[], None] | None = None,
        watch: bool = False,
        reference: Reference | None = None,
        apart: Sequence[int] = (),
        broken: str = "",
        lost_at_most: int | None = None,
    ) -> Trial:
        """What became of the run: waits for its job to end, then gives the same command until the run is finished.

        since: when the fault came, in monotonic seconds. seconds: to detect it; None: it is not. statuses: with which
        the job may end. found: words that it must say, a pattern. mend: what the user does before starting again.
        watch: compare what the model is given. apart: steps whose figures may differ. broken: a promise that was not
        kept, if one was not. lost_at_most: steps that may be trained a second time; None: as many as it takes.
        """
        job, wrong = trial.job, [broken] if broken else []
        if not job.wait_end():
            wrong.append(f"processes were still there after {time.monotonic() - since:.0f} s")
        seconds = time.monotonic() - since if seconds == UNTIL_END else seconds
        if statuses is not None and job.status not in statuses:
            wrong.append(f"ended with {job.status}, not {' or '.join(map(str, statuses))}: {job.complaint()}")
        if found is not None and not job.says(found):
            wrong.append(f"does not say {found!r}: {job.complaint()}")
        if mend is not None:
            mend()
        reference = reference or self.reference(trial.layout)
        self._finish(trial, watch, wrong)
        mine, theirs = figures(trial.folder), reference.figures
        for step, name in sorted(theirs.keys() | mine.keys()):
            if mine.get((step, name)) != theirs.get((step, name)) and step not in apart:
                wrong.append(f"{name} of step {step} is {mine.get((step, name))}, not {theirs.get((step, name))}")
                break
        lost, partial = _repeated(trial, reference)
        if partial:
            wrong.append(f"{partial} checkpoints that it went on from were not whole")
        if lost_at_most is not None and lost > lost_at_most:
            wrong.append(f"{lost} steps lost, not {lost_at_most}")
        tokens, wrong_tokens = self._compare_given(trial, reference) if watch else (0, 0)
        if wrong_tokens:
            wrong.append(f"{wrong_tokens} wrong tokens")
        if not wrong:
            shutil.rmtree(trial.folder, ignore_errors=True)
        return Trial(case, not wrong, lost, seconds, "; ".join(wrong), partial, tokens, wrong_tokens)

    def _finish(self, trial: TrialRun, watch: bool, wrong: list[str]) -> None:
        for _ in range(_TRIES):
            if trial.job.status == 0:
                return
            job = self.start(trial, {} if watch else None)
            if not job.wait_end():
                wrong.append("started again, its processes did not end")
            if job.status != 0:
                wrong.append(f"started again, it ended with {job.status}: {job.complaint()}")
        if trial.job.status != 0:
            wrong.append(f"not finished after {_TRIES} more starts")

    def _compare_given(self, trial: TrialRun, reference: Reference) -> tuple[int, int]:
        """(tokens that the ranks' models were given over all starts, those of other batches than the reference's)."""
        tokens = wrong = 0
        for start in trial.starts:
            first = (start.job.resumed_from() or 0) * per_step(trial.layout)
            for rank in range(RANKS):
                for number, note in enumerate(self.notes(start.job, "steps", rank), first):
                    tokens += note["tokens"]
                    wrong += note["tokens"] * (note["digest"] != reference.given[rank][number])
        return tokens, wrong


def _repeated(trial: TrialRun, reference: Reference) -> tuple[int, int]:
    """(steps that were trained again, checkpoints that were gone on from though they were not whole)."""
    lost = partial = 0
    for start in trial.starts:
        if (resumed := start.job.resumed_from()) is not None:
            lost += max(start.before - resumed, 0)
            # As it was before the start, byte for byte the reference's: more than the trainer itself can know.
            partial += resumed > 0 and start.whole.get(resumed) != reference.checkpoints.get(resumed)
    return lost, partial


def dice(*what: object) -> random.Random:
    """The same for the same trial, whenever and wherever it is made."""
    return random.Random(repr(what))
