"""What may be named as a checkpoint, and what does not go together; for generate and evaluate alike."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.__main__ import main as prepare
from data_prep.manifest import FILE_NAME, Manifest
from data_prep.tokenizer import ByteTokenizer
from tests.data.corpus import write_texts
from tests.data_prep.test_tokenizer import bpe_file
from tests.inference.checkpoints import config, write_checkpoint
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.errors import UserError
from titans_train.inference import Sampler, sample_text
from titans_train.models import LanguageModel
from titans_train.shape import ModelShape
from titans_train.training.manifest import read_manifest, write_manifest

Capture = pytest.CaptureFixture[str]
WRITE = ["--prompt", "def ", "--tokens", "30"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a byte-level model, whose training data are gone."""
    return write_checkpoint(config(tmp_path / "runs"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """A folder prepared with a tokenizer file, and its manifest."""
    folder = tmp_path_factory.mktemp("words")
    write_texts(folder / "texts")
    prepared = folder / "prepared"
    options = ["--tokenizer", str(bpe_file(folder)), "--validation-share", "0.3"]
    assert prepare(["--input", str(folder / "texts"), "--output", str(prepared), *options]) == 0
    return prepared, Manifest.from_text((prepared / FILE_NAME).read_text(), str(prepared))


def output(capsys: Capture, *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_checkpoint_can_be_chosen_by_folder_or_by_its_name_in_the_run(checkpoint: Path, capsys: Capture) -> None:
    run = str(checkpoint.parent.parent)
    old = output(capsys, "generate", run, *WRITE)
    write_checkpoint(config(checkpoint.parents[2]), step=20, seed=1)
    assert output(capsys, "generate", run, *WRITE) != old
    for name in (checkpoint.name, str(checkpoint)):
        assert output(capsys, "generate", run, *WRITE, "--checkpoint", name) == old
    for source in (run, str(checkpoint)):
        error = refused(capsys, "generate", source, *WRITE, "--checkpoint", "step-1")
        assert "step-1 holds no complete checkpoint" in error and "train first" not in error
        assert "there are step-00000020, step-00000010: name one of these" in error


@pytest.mark.parametrize("block", ["mac", "mag", "transformer"])
def test_a_checkpoint_of_an_earlier_version_is_what_it_was(block: str, tmp_path: Path, capsys: Capture) -> None:
    old: dict[str, dict[str, Any]] = {"attention": {"residual": False}}
    if block != "transformer":
        old["memory"] = {"gate": "both"}
    checkpoint = write_checkpoint(config(tmp_path / "runs", block, **old))
    now = output(capsys, "generate", str(checkpoint), *WRITE)
    record = read_manifest(checkpoint)
    shape = ModelShape.from_dict(record["shape"])
    for part in (record["shape"], record["config"]):
        del part["attention"]["residual"]
        for name in ("rule", "gate") if part["memory"] else ():
            del part["memory"][name]
    write_manifest(checkpoint, record)
    assert ModelShape.from_dict(record["shape"]) == shape
    for source in (checkpoint, checkpoint.parent.parent):
        assert output(capsys, "generate", str(source), *WRITE) == now
        assert output(capsys, "generate", str(source), "training.steps=99", *WRITE) == now
    out = tmp_path / "out"
    output(capsys, "export", str(checkpoint), str(out))
    assert output(capsys, "generate", str(out), *WRITE) == now
    if block == "mac":
        error = refused(capsys, "generate", str(checkpoint), *WRITE, "attention.residual=true")
        assert "attention.residual is False in the checkpoint, True in the config" in error


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_config_of_another_model_or_chunk_size_is_refused(verb: str, checkpoint: Path, capsys: Capture) -> None:
    run, options = checkpoint.parent.parent, WRITE if verb == "generate" else []
    for source in (run / "config.yaml", run, checkpoint):
        error = refused(capsys, verb, str(source), "memory.chunk_size=8", *options)
        assert "memory.chunk_size is 4 in the checkpoint, 8 in the config" in error


def test_a_change_of_the_stored_config_is_checked_like_any_other(checkpoint: Path, capsys: Capture) -> None:
    error = refused(capsys, "generate", str(checkpoint), "model.heads=5", "nonsense", *WRITE)
    assert f"the config in {checkpoint} with these changes is refused, 2 problems" in error


def test_settings_without_effect_on_the_model_may_differ(checkpoint: Path, capsys: Capture) -> None:
    usual = output(capsys, "generate", str(checkpoint), *WRITE)
    assert output(capsys, "generate", str(checkpoint), "memory.store_every=2", "training.steps=99", *WRITE) == usual


def test_a_tokenizer_file_is_found_where_the_data_lie_now_and_compared(
    words: tuple[Path, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    prepared, manifest = words
    run_config = config(tmp_path / "runs", model={"vocabulary": 304}, data={"path": "data/gone"})
    source = str(write_checkpoint(run_config, tokenizer=asdict(manifest.tokenizer)))
    error = refused(capsys, "generate", source, *WRITE)
    assert "data/gone" in error and "set data.path" in error
    assert output(capsys, "generate", source, f"data.path={prepared}", *WRITE).startswith("def ")
    record = read_manifest(Path(source))
    record["tokenizer"]["sha256"] = "0" * 64
    write_manifest(Path(source), record)
    assert "has another tokenizer" in refused(capsys, "generate", source, f"data.path={prepared}", *WRITE)


def test_data_of_another_tokenizer_are_not_evaluated(
    words: tuple[Path, Manifest], tmp_path: Path, capsys: Capture
) -> None:
    prepared, manifest = words
    run_config = config(tmp_path / "a", model={"vocabulary": 304}, data={"path": str(prepared)})
    of_bytes = str(write_checkpoint(run_config))
    assert "its figures would mean nothing" in refused(capsys, "evaluate", of_bytes, "--data", str(prepared))
    of_words = str(write_checkpoint(run_config, step=20, tokenizer=asdict(manifest.tokenizer)))
    assert "loss" in output(capsys, "evaluate", of_words, "--sequences", "2")


@pytest.mark.parametrize("temperature", ["0", "0.9"])
def test_sampling_goes_on_with_the_saved_random_numbers(
    temperature: str, checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    state = tmp_path / "text"
    verb = ["generate", str(checkpoint), "--temperature", temperature, "--top-p", "0.3"]
    whole = output(capsys, *verb, "--seed", "5", "--prompt", "import ", "--tokens", "40")
    first = output(capsys, *verb, "--seed", "5", "--prompt", "import ", "--tokens", "20", "--save-state", str(state))
    second = output(capsys, *verb, "--tokens", "20", "--load-state", str(state))
    assert (first[:-1] + second).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [state.name]


def test_a_state_of_another_checkpoint_or_no_state_is_refused(
    checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    output(capsys, "generate", str(checkpoint), "--prompt", "import ", "--tokens", "2", "--save-state", str(state))
    other = write_checkpoint(config(tmp_path / "runs"), step=20, seed=1)
    assert "was saved by another checkpoint" in refused(capsys, "generate", str(other), "--load-state", str(state))
    load = ["generate", str(checkpoint), "--load-state"]
    assert "there is no file" in refused(capsys, *load, str(tmp_path / "nothing"))
    state.write_bytes(b"nothing")
    assert "--load-state takes a file" in refused(capsys, *load, str(state))
    weights = checkpoint / "rank-00000.safetensors"
    assert "is not a saved model state" in refused(capsys, *load, str(weights))


def test_folders_that_are_not_there_are_named_first(checkpoint: Path, capsys: Capture, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "a" / "b")
    for verb in (["generate", str(checkpoint), *WRITE, "--save-state"], ["evaluate", str(checkpoint), "--json"]):
        assert f"there is no folder {tmp_path / 'a'}; create it" in refused(capsys, *verb, nowhere)


def test_a_state_that_cannot_be_saved_is_refused_before_anything_is_read(
    checkpoint: Path, capsys: Capture, tmp_path: Path
) -> None:
    """Before the text, and the model."""
    save = ["generate", str(checkpoint), "--prompt-file", str(tmp_path / "text"), "--save-state"]
    (tmp_path / "text").write_text("import ")
    weights = checkpoint / "rank-00000.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(b"")
    assert "is a folder; name a file in it" in refused(capsys, *save, str(tmp_path))
    assert "cannot be written" in refused(capsys, *save, "/proc/state")
    assert "cannot be written (File name too long)" in refused(capsys, *save, str(tmp_path / ("x" * 255)))
    weights.write_bytes(good)
    (tmp_path / "state").write_bytes(b"before")
    output(capsys, *save, str(tmp_path / "state"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["state", "text"]


def test_a_prompt_of_other_tokens_and_a_diverged_model_are_refused() -> None:
    small = LanguageModel(tiny("lmm", vocabulary=200))
    with pytest.raises(UserError, match=r"token 226, the model's vocabulary is 200: .*data\.path"):
        sample_text(small, ByteTokenizer(), "an ∞", 5)
    with pytest.raises(UserError, match="the prompt is empty"):
        sample_text(small, ByteTokenizer(), "", 5)
    with pytest.raises(UserError, match="has diverged; use an earlier checkpoint"):
        Sampler().draw(torch.tensor([0.0, float("nan")]), torch.Generator())


def test_a_prompt_that_is_not_utf8_is_refused(checkpoint: Path, capsys: Capture) -> None:
    assert "not UTF-8 text at character 1" in refused(capsys, "generate", str(checkpoint), "--prompt", "a\udcff")
