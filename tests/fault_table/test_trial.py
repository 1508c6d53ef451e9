"""The table says what was tried, survived, lost, and what falls short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from titans_train.benchmark.faults import damage
from titans_train.benchmark.faults.job import Job
from titans_train.benchmark.faults.long_run import Held, judged
from titans_train.benchmark.faults.trial import Row, Trial, table


def test_the_table_counts_trials_and_names_each_that_fell_short() -> None:
    kills = Row("kill", "kill -9", [Trial("a", True, 2, 1.0), Trial("b", False, 5, 3.0, "loss of step 3", 1, 64, 8)])
    text = table([kills, Row("node", "a lost node", absent="no SLURM")])
    assert "| kill -9 | 2 | 1 | 3.5, 5 | 2.0, 3.0 |" in text
    assert "| a lost node | 0 | 0 |  |  |" in text and "a lost node: not tried: no SLURM" in text
    assert "| **all** | 2 | 1 |" in text and "kill -9: b: loss of step 3" in text
    assert "Partial checkpoints accepted: 1. Wrong tokens: 8 of 64" in text


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
