"""The long tests: what the defaults learn. Minutes each; run with --all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titans_train.benchmark import main


@pytest.mark.long
def test_the_memory_recalls_and_without_writing_it_stays_at_chance(tmp_path: Path) -> None:
    main(["recall", "--off-steps", "300", "--json", str(tmp_path / "r.json")])
    curves = json.loads((tmp_path / "r.json").read_text())["curves"]
    assert curves["memory on"][-1]["accuracy"] >= 0.95
    assert curves["theta = 0"][-1]["accuracy"] <= 0.05


@pytest.mark.long
@pytest.mark.parametrize("block", ["lmm", "mac", "mag", "mal"])
def test_every_block_trains_beside_a_row_of_equal_tokens(block: str, tmp_path: Path) -> None:
    path = tmp_path / "stability.json"
    assert main(["stability", "--blocks", block, "--chunks", "16", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())
    assert run["finite"] and run["steps"] == 300 and run["loss"] < run["unigram_entropy"]
