"""What counts as survived: a trainer that does something wrong after a kill is found out, whatever it is."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests.fault_table import trainer
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.run import FIRST, Reference, TrialRun, digest
from titans_train.benchmark.faults.trial import Trial


class Stage(Lab):
    """Runs `trainer.py` in place of the trainer."""

    def command(self, trial: TrialRun, wrapped: Sequence[str]) -> list[str]:
        return [sys.executable, str(Path(trainer.__file__)), str(trial.folder), trial.settings[-1]]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    lab = Stage(tmp_path)
    steps = range(1, trainer.STEPS + 1)
    figures = {(step, "loss"): 1 / step for step in steps} | {(step, "grad_norm"): 1.0 for step in steps}
    whole = {"rank-00000.safetensors": digest(b"whole")}
    lab.once(("reference", FIRST, (), 0), lambda: Reference(tmp_path, figures, {trainer.SAVED: whole}, {}, {}))
    return lab


def judged(
    stage: Stage, what: str, limit: float = 60, statuses: list[int] | None = None, lost_at_most: int | None = None
) -> Trial:
    trial = stage.new_run("trial", FIRST, what)
    job = stage.start(trial)
    job.wait_end(limit)
    return stage.outcome(trial, what, time.monotonic(), statuses=statuses, lost_at_most=lost_at_most)


def test_a_killed_run_that_goes_on_as_if_nothing_had_been_has_survived(stage: Stage) -> None:
    found = judged(stage, "dies", statuses=[137])
    assert found.survived and not found.note and found.steps_lost == 1 and found.partial == 0


def test_a_loss_that_differs_in_its_last_digits_is_found(stage: Stage) -> None:
    found = judged(stage, "loss")
    assert not found.survived and "loss of step 5 is 0.200000000001" in found.note


def test_a_checkpoint_that_was_not_whole_is_found_even_where_the_losses_agree(stage: Stage) -> None:
    found = judged(stage, "partial")
    assert not found.survived and found.partial == 1 and "were not whole" in found.note


def test_another_exit_status_than_promised_and_a_run_that_never_ends_well_are_found(stage: Stage) -> None:
    assert "ended with 137, not 75" in judged(stage, "dies", statuses=[75]).note
    found = judged(stage, "refuses")
    assert not found.survived and "not finished after 4 more starts" in found.note and "error: no" in found.note


def test_steps_that_are_lost_where_none_may_be_are_found(stage: Stage) -> None:
    found = judged(stage, "dies", lost_at_most=0)
    assert not found.survived and found.note == "1 steps lost, not 0" and found.steps_lost == 1


def test_a_process_that_stays_is_found_though_it_left_its_session_and_is_ended(stage: Stage) -> None:
    trial = stage.new_run("trial", FIRST, "stays")
    job = stage.start(trial)
    assert not job.wait_end(3)
    assert job.processes() == []
    found = stage.outcome(trial, "stays", time.monotonic())  # it has ended by now: not by itself
    assert not found.survived and "processes were still there" in found.note


def test_a_trial_that_breaks_off_is_not_survived_says_why_and_leaves_no_process(stage: Stage) -> None:
    trials = []

    def gone() -> Trial:
        trials.append(stage.new_run("trial", FIRST, "good"))
        stage.start(trials[-1]).rank(1)
        raise AssertionError

    found = stage.attempt("gone", gone)
    assert found.case == "gone" and not found.survived and "rank 1 was already gone" in found.note
    assert trials[0].job.processes() == []
    found = stage.attempt("wrong", lambda: judged(stage, {}["what"]))
    assert not found.survived and "Traceback" in found.note and "KeyError: 'what'" in found.note


def test_checkpoints_are_compared_by_their_tensors_not_by_their_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2, 3)
    content = save({"a": a, "b": b})
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(dict(reversed(json.loads(content[8:start]).items()))).encode()
    other_order = len(header).to_bytes(8, "little") + header + content[start:]
    assert other_order != content and digest(other_order) == digest(content)
    others = [save({"a": a + 1e-6, "b": b}), save({"a": a, "c": b}), save({"a": a, "b": b.view(3, 2)}), content[:-1]]
    assert len({digest(content), *map(digest, others)}) == 5
