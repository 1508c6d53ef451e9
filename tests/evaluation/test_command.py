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
    assert set(result) >= FIGURES and "accuracy_low" not in result  # positions of a text are no draws
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
    checkpoint = str(write_checkpoint(run_config, tokenizer=None))
    result = figures(tmp_path, checkpoint, "--sequences", "40")
    assert 0 < result["accuracy"] < 1 and result["tokens"] == 80
    assert "accuracy" in capsys.readouterr().out
    assert 0 < result["accuracy_low"] < result["accuracy"] < result["accuracy_high"] < 1
    shorter = figures(tmp_path, checkpoint, "--sequences", "10")
    width, shorter_width = (r["accuracy_high"] - r["accuracy_low"] for r in (result, shorter))
    assert 0.04 < width < shorter_width


def test_input_that_cannot_be_is_refused(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    source, run_config = str(checkpoint), str(checkpoint.parent.parent / "config.yaml")
    assert "at least 1" in refused(capsys, source, "--sequences", "0")
    assert "train first" in refused(capsys, str(tmp_path))
    assert "nothing" in refused(capsys, source, "--data", str(tmp_path / "nothing"))
    assert "lower training.sequence_length" in refused(capsys, run_config, "training.sequence_length=65536")


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    source = str(checkpoint)
    for name in ("--json", "--picture"):
        assert "is a folder" in refused(capsys, source, name, str(tmp_path))
        assert "there is no folder" in refused(capsys, source, name, str(tmp_path / "none" / "x.png"))
        assert "cannot be written" in refused(capsys, source, name, "/proc/x.png")
    for picture in ("x.foo", "x", "png"):
        assert "does not end with .png, .svg, .pdf" in refused(capsys, source, "--picture", str(tmp_path / picture))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_figures_are_kept_where_the_picture_cannot_be_written(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "full.png").symlink_to("/dev/full")
    words = ["evaluate", str(checkpoint), "--sequences", "2", "--picture", str(tmp_path / "full.png")]
    assert main([*words, "--json", str(tmp_path / "f.json")]) == 2
    assert json.loads((tmp_path / "f.json").read_text())["sequences"] == 2
    assert "full.png cannot be written: No space left" in capsys.readouterr().err
    assert main([*words, "--json", "/dev/full"]) == 2
    assert "/dev/full cannot be written: No space left" in capsys.readouterr().err
