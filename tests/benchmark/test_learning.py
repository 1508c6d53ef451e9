"""The long tests: what the defaults learn. Minutes each; run with --all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titans_train.benchmark import main


@pytest.mark.long
def test_the_memory_recalls_and_without_writing_it_does_not(tmp_path: Path) -> None:
    path, folder = tmp_path / "recall.json", str(tmp_path / "runs")
    words = ["--tasks", "recall", "--variants", "lmm", "lmm, memory off", "--seeds", "1", "--folder", folder]
    assert main(["ablations", *words, "--json", str(path)]) == 0
    accuracy = {run["variant"]: run["figures"]["accuracy"] for run in json.loads(path.read_text())}
    assert accuracy["lmm"] >= 0.95
    assert accuracy["lmm, memory off"] <= 0.15


@pytest.mark.long
@pytest.mark.parametrize("block", ["lmm", "mac", "mag", "mal"])
def test_every_block_trains_beside_a_row_of_equal_tokens(block: str, tmp_path: Path) -> None:
    path = tmp_path / "stability.json"
    assert main(["stability", "--blocks", block, "--chunks", "16", "--json", str(path)]) == 0
    (run,) = json.loads(path.read_text())
    assert run["finite"] and run["steps"] == 300 and run["loss"] < run["unigram_entropy"]
