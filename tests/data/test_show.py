"""show-data prints what the model is given: every character of a row, under the document it is from."""

import re
from pathlib import Path

import pytest

from tests.data.corpus import END, mixed_config, run_config
from titans_train.__main__ import main
from titans_train.config import RunConfig, dump_config
from titans_train.data import TokenDataset, loader, open_dataset
from titans_train.plan import make_plan

Capture = pytest.CaptureFixture[str]


def shown(config: RunConfig, tmp_path: Path, capsys: Capture, *options: str) -> str:
    (tmp_path / "config.yaml").write_text(dump_config(config))
    capsys.readouterr()
    assert main(["show-data", str(tmp_path / "config.yaml"), *options]) == 0
    return capsys.readouterr().out


def test_every_row_is_shown_with_its_documents_and_their_text(
    sources: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    config = mixed_config(sources, tmp_path, packing="isolate", micro=8)
    out = shown(config, tmp_path, capsys, "--step", "3", "--characters", "0")
    batch = next(loader(open_dataset(config, "train", 1), make_plan(config, 1), 0, 2))[0]
    dataset = open_dataset(config, "train", 1)
    assert isinstance(dataset, TokenDataset) and batch.document_starts is not None
    blocks = out.split("\nrow ")[1:]
    assert len(blocks) == 8 and out.startswith("step 3: sequences 16 to 23 of the run, 8 shown")
    for row, block in enumerate(blocks):
        stream, place = dataset.place(16 + row)
        assert block.startswith(f"{row}: sequence {16 + row}, of source {stream.name} (its sequence {place}, epoch 1)")
        spans = [(int(a), int(b)) for a, b in re.findall(r"^  \[(\d+), (\d+)\) ", block, re.M)]
        assert spans[0][0] == 0 and spans[-1][1] == 128
        assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
        assert [a for a, _ in spans] == batch.document_starts[row].nonzero().flatten().tolist()
        parts = re.split(r"^  \[.*$\n", block, flags=re.M)[1:]
        for (first, last), part in zip(spans, parts, strict=True):
            tokens = [t for t in batch.tokens[row, first:last].tolist() if t != END]
            text = "\n".join(line[6:] for line in part.splitlines() if line.startswith("    | "))
            assert text.rstrip("\n") == bytes(tokens).decode().rstrip("\n")


def test_borders_are_named_as_the_model_sees_them(prepared: Path, tmp_path: Path, capsys: Capture) -> None:
    out = shown(run_config(prepared, tmp_path, shuffle=False), tmp_path, capsys, "--rows", "2")
    assert out.count("\nrow ") == 2 and "starts afresh" not in out
    assert re.search(r"\[0, \d+\) texts/\d+\.txt: begins, ends \(tokens 0 to \d+ of \d+\)\n", out)
    isolated = shown(run_config(prepared, tmp_path, packing="isolate"), tmp_path, capsys, "--rows", "1")
    assert "the model starts afresh" in isolated and "positions have no label" in isolated


def test_a_step_that_cannot_be_is_refused(prepared: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(run_config(prepared, tmp_path)))
    assert main(["show-data", str(tmp_path / "config.yaml"), "--step", "0"]) == 2
    assert "--step is 0; the first step is 1" in capsys.readouterr().err
