"""The end of a run: its results are those of all its steps, and a file that cannot be written is named, not a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT, torchrun
from tests.training.finish_worker import STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, prepared = tmp_path_factory.mktemp("runs"), prepare_folder(tmp_path_factory.mktemp("corpus"))
    done = torchrun(2, str(ROOT / "tests/training/finish_worker.py"), str(folder), str(prepared))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (folder / "console.txt").write_text(done.stdout)
    return folder


def found(folder: Path, name: str) -> list[list[dict[str, Any]]]:
    """Of each rank, how each start of a case ended."""
    ranks = [path.read_text().splitlines() for path in sorted(folder.glob("found-*.jsonl"))]
    return [next(f["found"] for f in map(json.loads, lines) if f["name"] == name) for lines in ranks]


def test_a_summary_of_other_steps_or_a_damaged_one_is_made_anew(folder: Path) -> None:
    for whole, again, other, damaged in found(folder, "summaries"):
        assert whole["steps"] == other["steps"] == damaged["steps"] == STEPS and again == {}
        assert whole["loss"] == other["loss"] and whole["validation_loss"] == pytest.approx(other["validation_loss"])
    summary = json.loads((folder / "summaries" / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["run"] == "summaries"
    assert (folder / "console.txt").read_text().count("summaries is finished; nothing to do") == 1


def test_results_that_cannot_be_written_are_named_on_every_rank_and_made_by_the_next_start(folder: Path) -> None:
    run, said = folder / "results", (folder / "console.txt").read_text()
    for failed, mended in found(folder, "results"):
        assert failed["agreed"] and f"{run / 'summary.json'} cannot be written (Is a directory)" in failed["error"]
        assert "All steps are trained and saved" in failed["error"] and mended["steps"] == STEPS
    assert f"{run / 'metrics.jsonl'} cannot be written (Is a directory); training goes on" in said
    assert f"{run / 'loss.png'} could not be written (Is a directory)" in said
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS and (run / "loss.png").is_file()
    assert not list(run.glob("*.writing"))


def test_a_signal_before_the_first_step_says_truthfully_what_is_saved(folder: Path) -> None:
    assert found(folder, "early") == [[{"stopped": 0}, {"stopped": 1}]] * 2
    lines = (folder / "console.txt").read_text().splitlines()
    said = [line.split("; exit status")[0] for line in lines if "stopped" in line]
    assert said == [
        "SIGUSR1: stopped before the first step; this start has trained nothing",
        "SIGTERM: stopped before the first step; nothing was trained since step 1, which is saved",
    ]
