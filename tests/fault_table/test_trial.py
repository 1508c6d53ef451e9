"""The table says what was tried, survived, lost, and what falls short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titans_train.benchmark.faults import command, damage, main
from titans_train.benchmark.faults.job import Job
from titans_train.benchmark.faults.lab import Lab
from titans_train.benchmark.faults.long_run import Held, judged
from titans_train.benchmark.faults.trial import Row, Trial, table
from titans_train.errors import UserError


def test_the_table_counts_trials_and_names_each_that_fell_short() -> None:
    kills = Row("kill", "kill -9", [Trial("a", True, 2, 1.0), Trial("b", False, 5, 3.0, "loss of step 3", 1, 64, 8)])
    kills.trials.append(Trial("c", False, note="Traceback:\n  at\nKeyError: 1\n"))
    text = table([kills, Row("node", "a lost node", absent="no SLURM")])
    assert "| kill -9 | 3 | 1 | 3.5, 5 | 2.0, 3.0 |" in text
    assert "| a lost node | 0 | 0 |  |  |" in text and "a lost node: not tried: no SLURM" in text
    assert (
        "| **all** | 3 | 1 |" in text
        and "kill -9: c: Traceback: … KeyError: 1" in text
        and "kill -9: b: loss of step 3" in text
    )
    assert "Partial checkpoints accepted: 1. Wrong tokens: 8 of 64" in text


def test_a_row_without_trials_counts_as_kept_only_where_the_machine_could_not_try_it() -> None:
    good, bad = Trial("a", True), Trial("b", False)
    assert Row("kill", "", [good]).kept and Row("node", "", absent="no SLURM", excused=True).kept
    assert not Row("kill", "", [good, bad]).kept and not Row("kill", "", absent="nothing").kept


def test_a_folder_in_use_and_too_few_seeds_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("of an earlier table")
    with pytest.raises(UserError, match=r"not an empty folder; give another"):
        main(["--folder", str(tmp_path), "--only", "kill"])
    with pytest.raises(UserError, match=r"--seeds 0: at least 1"):
        main(["--folder", str(tmp_path / "new"), "--seeds", "0"])
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_row_that_breaks_off_does_not_take_the_table_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(command.FAULTS, "wrong", ("command.no_such_row", "of {steps:,} steps"))
    row = command.run_row("wrong", Lab(tmp_path, quick=True))
    assert row.text == "of 1,000 steps" and not row.kept and "AttributeError" in row.trials[0].note


@pytest.mark.parametrize("way", damage.ALONE)
def test_a_damaged_file_is_another_and_a_backup_brings_it_back(way: str, tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytes(range(200))
    path.write_bytes(content)
    backup = damage.Backup(tmp_path / "backup", path)
    damage.ALONE[way](path)
    assert not path.exists() or path.read_bytes() != content
    backup.restore()
    assert path.read_bytes() == content


def test_swapped_files_have_each_others_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    (tmp_path / "b").write_text("two")
    damage.swap(tmp_path / "a", tmp_path / "b")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("two", "one")


@pytest.mark.parametrize(
    ("files", "memory", "grew"), [(0, 0.0, ""), (1, 0.0, "files grew"), (0, 9.0, "memory_mib grew")]
)
def test_growth_in_a_long_run_is_told(files: int, memory: float, grew: str, tmp_path: Path) -> None:
    job = Job([sys.executable, "-c", ""], tmp_path / "console.txt")
    job.wait_end()
    points = [Held(n, 300 + n * memory, 40 + n * files, 8, 3, 2, 1.0) for n in range(20)]
    found = judged(job, 20, points)
    assert found.note == grew and found.survived == (not grew)
