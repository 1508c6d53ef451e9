"""A trial of each fault: everything is survived. `benchmark faults` without --quick makes the table of the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titans_train.benchmark import main
from titans_train.benchmark.faults.command import FAULTS

SLURM = {"node", "preempted"}  # tests/slurm has these and more


def test_a_trial_of_each_fault_is_survived(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in FAULTS if name not in SLURM]
    results = tmp_path / "faults.json"
    status = main(["faults", "--quick", "--folder", str(tmp_path / "lab"), "--json", str(results), "--only", *names])
    printed = capsys.readouterr()
    found = json.loads(results.read_text())
    assert [row["name"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert row["excused"] or row["trials"], row["name"]
        assert all(trial["survived"] and trial["partial"] == 0 for trial in row["trials"]), row
    assert status == 0 and "Partial checkpoints accepted: 0. Wrong tokens: 0 of" in printed.out
    assert found["versions"]["torch"] and "--quick" in found["command"]
