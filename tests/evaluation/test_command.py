"""The verb evaluate, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.corpus import prepare_folder
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main

Capture = pytest.CaptureFixture[str]
FIGURES = {"loss", "perplexity", "bits_per_byte", "tokens", "sequences"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def checkpoint(prepared: Path, tmp_path: Path) -> Path:
    return write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))


def figures(tmp_path: Path, *args: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    assert main(["evaluate", *args, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def refused(capsys: Capture, *args: str) -> str:
    capsys.readouterr()
    assert main(["evaluate", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_figures_are_printed_and_written(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    run = checkpoint.parent.parent
    result = figures(tmp_path, str(run), "--sequences", "4")
    assert set(result) >= FIGURES
    assert (result["sequences"], result["tokens"]) == (4, 4 * 64)
    out = capsys.readouterr().out
    assert f"{result['loss']:.4f}" in out and f"{result['bits_per_byte']:.4f}" in out
    for source in (run / "config.yaml", checkpoint):
        assert figures(tmp_path, str(source), "--sequences", "4") == result


def test_split_length_and_data_can_be_chosen(checkpoint: Path, prepared: Path, tmp_path: Path) -> None:
    source = str(checkpoint)
    usual = figures(tmp_path, source, "--sequences", "4")
    train = figures(tmp_path, source, "--sequences", "4", "--split", "train")
    assert train["loss"] != usual["loss"]
    longer_config = str(checkpoint.parent.parent / "config.yaml")
    longer = figures(tmp_path, longer_config, "training.sequence_length=128", "--sequences", "2")
    assert longer["tokens"] == usual["tokens"]
    shutil.copytree(prepared, tmp_path / "copy")
    elsewhere = figures(tmp_path, source, "--sequences", "4", "--data", str(tmp_path / "copy"))
    assert all(elsewhere[name] == usual[name] for name in FIGURES)


def test_accuracy_is_given_on_the_recall_task(tmp_path: Path, capsys: Capture) -> None:
    recall = {"pairs": 2, "keys": 4, "values": 4, "gap": 4}
    run_config = config(tmp_path / "runs", "lmm", data={"path": None, "source": "recall", "recall": recall})
    result = figures(tmp_path, str(write_checkpoint(run_config, tokenizer=None)), "--sequences", "8")
    assert 0 <= result["accuracy"] <= 1 and result["tokens"] == 16
    assert "accuracy" in capsys.readouterr().out


def test_input_that_cannot_be_is_refused(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    source, run_config = str(checkpoint), str(checkpoint.parent.parent / "config.yaml")
    assert "at least 1" in refused(capsys, source, "--sequences", "0")
    assert "train first" in refused(capsys, str(tmp_path))
    assert "nothing" in refused(capsys, source, "--data", str(tmp_path / "nothing"))
    assert "lower training.sequence_length" in refused(capsys, run_config, "training.sequence_length=65536")
