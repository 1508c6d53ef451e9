"""The verb generate, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import prepare_folder
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main
from titans_train.training.checkpoint_folder import find_latest

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def checkpoint(prepared: Path, tmp_path: Path) -> Path:
    return write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))


def generated(capsys: Capture, *args: str) -> str:
    capsys.readouterr()
    assert main(["generate", *args]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *args: str) -> str:
    """What stands on stderr; argparse refuses by leaving with status 2 as well."""
    capsys.readouterr()
    try:
        status = main(["generate", *args])
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    return captured.err


def test_a_config_a_run_and_a_checkpoint_name_the_same_model(checkpoint: Path, capsys: Capture) -> None:
    run = checkpoint.parent.parent
    assert find_latest(run) == checkpoint
    options = ["--prompt", "def ", "--tokens", "12", "--seed", "3"]
    texts = {generated(capsys, str(source), *options) for source in (run / "config.yaml", run, checkpoint)}
    assert len(texts) == 1
    assert texts.pop().startswith("def ")


def test_20_tokens_are_10_saved_loaded_and_10_more(checkpoint: Path, capsys: Capture, tmp_path: Path) -> None:
    source, state = str(checkpoint), str(tmp_path / "text.safetensors")
    greedy = [source, "--temperature", "0"]
    whole = generated(capsys, *greedy, "--prompt", "import ", "--tokens", "20")
    first = generated(capsys, *greedy, "--prompt", "import ", "--tokens", "10", "--save-state", state)
    second = generated(capsys, *greedy, "--tokens", "10", "--load-state", state)
    # A character that the cut divides reads as damaged on both sides of it.
    assert (first[:-1] + second).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert len(whole) > len("import ") + 5


def test_a_prompt_file_is_the_same_as_a_prompt(checkpoint: Path, capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("größer", "utf-8")
    options = [str(checkpoint), "--tokens", "5", "--temperature", "0"]
    from_file = generated(capsys, *options, "--prompt-file", str(file))
    assert from_file == generated(capsys, *options, "--prompt", "größer")


def test_a_state_of_another_model_or_chunk_size_is_refused(
    checkpoint: Path, prepared: Path, capsys: Capture, tmp_path: Path
) -> None:
    state = str(tmp_path / "state")
    generated(capsys, str(checkpoint), "--prompt", "import ", "--tokens", "2", "--save-state", state)
    data = {"path": str(prepared)}
    other = write_checkpoint(config(tmp_path / "a", memory={"chunk_size": 2}, data=data))
    assert "chunk_size is 4 in the file, 2 in this model" in refused(capsys, str(other), "--load-state", state)
    mal = write_checkpoint(config(tmp_path / "b", "mal", data=data))
    assert "block is mag in the file, mal in this model" in refused(capsys, str(mal), "--load-state", state)


def test_missing_and_damaged_checkpoints_are_refused(checkpoint: Path, capsys: Capture, tmp_path: Path) -> None:
    run = checkpoint.parent.parent
    assert "there is no file" in refused(capsys, str(tmp_path / "nothing.yaml"), "--prompt", "x")
    assert "train first" in refused(capsys, str(run / "config.yaml"), "run.name=other", "--prompt", "x")
    assert "train first" in refused(capsys, str(tmp_path), "--prompt", "x")
    weights = checkpoint / "rank-00000.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert "rank-00000.safetensors is damaged" in refused(capsys, str(checkpoint), "--prompt", "x")


def test_prompts_and_sampling_values_that_cannot_be_are_refused(
    checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    source = str(checkpoint)
    file = tmp_path / "latin1.txt"
    file.write_bytes("größer".encode("latin-1"))
    assert "give --prompt" in refused(capsys, source)
    assert "give --prompt" in refused(capsys, source, "--prompt", "")
    assert "UTF-8" in refused(capsys, source, "--prompt-file", str(file))
    assert "No such file" in refused(capsys, source, "--prompt-file", str(tmp_path / "nothing.txt"))
    for seed in ("-1", str(1 << 63), "9" * 20):
        assert f"--seed is {seed}; it is from 0 to" in refused(capsys, source, "--prompt", "x", "--seed", seed)
    for values in (["--top-p", "2"], ["--top-p", "0"], ["--temperature", "-1"], ["--tokens", "-1"]):
        assert values[0].strip("-") in refused(capsys, source, "--prompt", "x", *values)


def test_a_model_without_text_behind_its_tokens_writes_none(tmp_path: Path, capsys: Capture) -> None:
    recall = {"pairs": 2, "keys": 4, "values": 4, "gap": 4}
    run_config = config(tmp_path / "runs", "lmm", data={"path": None, "source": "recall", "recall": recall})
    assert "no text" in refused(capsys, str(write_checkpoint(run_config, tokenizer=None)), "--prompt", "x")
