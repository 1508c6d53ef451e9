"""The verb export: one folder that gives the checkpoint's own logits, whole or not there at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.__main__ import main as prepare
from data_prep.manifest import FILE_NAME, Manifest
from tests.data.corpus import write_texts
from tests.data_prep.test_tokenizer import bpe_file
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main
from titans_train.inference import export as module
from titans_train.inference.exported import Exported
from titans_train.inference.source import find, load_checked
from titans_train.models import LanguageModel
from titans_train.shape import BLOCKS, ModelShape

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
TOKENS = torch.arange(24)[None] * 7 % 256


def logits(name: Path) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_checked(find(str(name), []))[0](TOKENS).logits
    return found


def output(capsys: Capture, *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *args: object) -> str:
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize("block", BLOCKS)
def test_an_exported_model_gives_the_checkpoints_logits_bit_for_bit(block: str, tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(config(tmp_path / "runs", block)), tmp_path / "out"
    assert main(["export", str(checkpoint), str(out)]) == 0
    assert torch.equal(logits(out), logits(checkpoint))
    shape = ModelShape.from_dict(json.loads((out / "model.json").read_text()))
    model = LanguageModel(shape)  # as its README says
    model.load_state_dict(load_file(str(out / "model.safetensors")))
    assert torch.equal(model.eval()(TOKENS).logits, logits(checkpoint))


def test_bfloat16_is_the_rounded_model(tmp_path: Path) -> None:
    checkpoint, out = write_checkpoint(config(tmp_path / "runs")), tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--dtype", "bfloat16"]) == 0
    model, _ = load_checked(find(str(checkpoint), []))
    stored = load_file(str(out / "model.safetensors"))
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(value.bfloat16(), stored[name]) for name, value in model.named_parameters())
    exported, _ = load_checked(find(str(out), []))
    assert all(torch.equal(value, stored[name].float()) for name, value in exported.named_parameters())


def test_generate_writes_the_same_and_goes_on_from_the_checkpoints_state(tmp_path: Path, capsys: Capture) -> None:
    checkpoint, out, state = write_checkpoint(config(tmp_path / "runs")), tmp_path / "out", tmp_path / "state"
    text = output(capsys, "export", checkpoint, out)
    assert f"of {checkpoint} as float32" in text
    write = ["--prompt", "import ", "--tokens", "20"]
    expected = output(capsys, "generate", checkpoint, *write, "--save-state", state)
    assert output(capsys, "generate", out, *write) == expected
    on = ["--tokens", "20", "--load-state", state]
    assert output(capsys, "generate", out, *on) == output(capsys, "generate", checkpoint, *on)


def test_an_export_takes_the_tokenizer_of_the_data_along(tmp_path: Path, capsys: Capture) -> None:
    write_texts(tmp_path / "texts")
    prepared, out = tmp_path / "prepared", tmp_path / "out"
    options = ["--tokenizer", str(bpe_file(tmp_path)), "--validation-share", "0.3"]
    assert prepare(["--input", str(tmp_path / "texts"), "--output", str(prepared), *options]) == 0
    entry = Manifest.from_text((prepared / FILE_NAME).read_text(), "here").tokenizer
    run = config(tmp_path / "runs", model={"vocabulary": 304}, data={"path": str(prepared)})
    checkpoint = write_checkpoint(run, tokenizer=asdict(entry))
    output(capsys, "export", checkpoint, out)
    write = ["--prompt", "abc def", "--tokens", "9"]
    expected = output(capsys, "generate", checkpoint, *write)
    figures = output(capsys, "evaluate", checkpoint, "--data", prepared, "--sequences", "2").splitlines()[1:]
    assert output(capsys, "evaluate", out, "--data", prepared, "--sequences", "2").splitlines()[1:] == figures
    prepared.rename(tmp_path / "gone")
    assert output(capsys, "generate", out, *write) == expected
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "gone" / "tokenizer.json").read_bytes()
    other = tmp_path / "other"
    assert "set data.path" in refused(capsys, "export", checkpoint, other)
    assert not other.exists()
    output(capsys, "export", checkpoint, other, f"data.path={tmp_path / 'gone'}")


def test_a_model_of_a_synthetic_task_has_no_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    recall = {"pairs": 2, "keys": 4, "values": 4, "gap": 4}
    run = config(tmp_path / "runs", "lmm", data={"path": None, "source": "recall", "recall": recall})
    output(capsys, "export", write_checkpoint(run, tokenizer=None), tmp_path / "out")
    assert "no text" in refused(capsys, "generate", tmp_path / "out", "--prompt", "x")
    assert "accuracy" in output(capsys, "evaluate", tmp_path / "out", "--sequences", "2")


def test_what_is_there_is_not_overwritten_and_half_an_export_does_not_stay(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = write_checkpoint(config(tmp_path / "runs")), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "exists already" in refused(capsys, "export", checkpoint, out)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert "exists already" in refused(capsys, "export", checkpoint, link)
    assert "there is no folder" in refused(capsys, "export", checkpoint, tmp_path / "a" / "b")
    (tmp_path / "new.tmp").mkdir()
    (tmp_path / "new.tmp" / "thesis.txt").write_text("mine")
    assert "remove what another export left" in refused(capsys, "export", checkpoint, tmp_path / "new")
    assert (tmp_path / "new.tmp" / "thesis.txt").read_text() == (out / "thesis.txt").read_text() == "mine"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_seal", full)
    assert "No space left" in refused(capsys, "export", checkpoint, tmp_path / "third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "new.tmp", "out", "runs"]


def test_what_else_lies_beside_an_export_is_not_looked_at(tmp_path: Path, capsys: Capture) -> None:
    checkpoint = write_checkpoint(config(tmp_path / "runs"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "parameters of" in output(capsys, "export", checkpoint, tmp_path / "out")


def test_the_commands_of_its_readme_work_where_it_lies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(write_checkpoint(config(tmp_path / "runs"))), str(out)]) == 0
    text = (out / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    program = f"import torch\ntokens = torch.arange(9)[None]\n{code}\nassert logits.isfinite().all()"
    run = {"cwd": out, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": 120, "check": True}
    subprocess.run([sys.executable, "-c", program], **run)
    assert sorted(Exported.open(out).manifest["files"]) == [
        "README.md", "config.yaml", "model.json", "model.safetensors"
    ]  # fmt: skip
