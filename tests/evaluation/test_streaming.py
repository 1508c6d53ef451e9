"""Reading a text in one pass: its loss is that of one long forward, at a state that does not grow."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from data_prep.tokenizer import SentencePieceTokenizer
from tests.data.corpus import prepare_folder
from tests.data_prep.test_tokenizer import model_file
from tests.inference.checkpoints import config, write_checkpoint
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.evaluation.streaming import read_stream, together
from titans_train.evaluation.streaming_task import text_tokens
from titans_train.inference.incoming import PIECE, texts_of
from titans_train.models import LanguageModel
from titans_train.shape import BLOCKS

LENGTH = 300


@pytest.mark.parametrize("block", [*BLOCKS, "lmm-mamba2"])
@pytest.mark.parametrize("piece", [7, 64, 1000])
def test_the_loss_is_that_of_one_forward_however_the_text_is_cut(block: str, piece: int) -> None:
    torch.manual_seed(0)
    model = LanguageModel(tiny(block)).double().eval()
    text = torch.randint(0, 29, (LENGTH,))
    rows = read_stream(model, iter(text.split(piece)), torch.device("cpu"))
    with torch.no_grad():
        losses = F.cross_entropy(model(text[None, :-1]).logits[0], text[1:], reduction="none")
    assert [(r["first"], r["last"]) for r in rows] == [
        (0, 15), (16, 31), (32, 63), (64, 127), (128, 255), (256, LENGTH - 2),
    ]  # fmt: skip
    for r in rows:
        assert r["loss"] == pytest.approx(float(losses[r["first"] : r["last"] + 1].mean()), rel=1e-10)
    assert together(rows)["loss"] == pytest.approx(float(losses.mean()), rel=1e-10)
    if block not in ("transformer", "mac"):  # mac's grows within a segment
        assert len({r["state_bytes"] for r in rows if r["first"] >= 16}) <= 2  # inside a chunk, with its anchor, or not


def test_the_verb_reads_a_file_and_the_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = prepare_folder(tmp_path)
    checkpoint = write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))
    (tmp_path / "text.txt").write_text("Wörter, eins nach dem anderen.\n" * 20, "utf-8")
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ["evaluate", str(checkpoint), "--task", "stream", "--json", str(out)]
    assert main([*words, "--text", str(tmp_path / "text.txt"), "--piece", "100", "--picture", str(picture)]) == 0
    found = json.loads(out.read_text())
    assert found["tokens"] == 20 * len("Wörter, eins nach dem anderen.\n".encode()) - 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--tokens", "1000"]) == 0
    assert json.loads(out.read_text())["tokens"] == 999
    capsys.readouterr()
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    for wrong, message in (
        (["--text", str(tmp_path / "none.txt")], "none.txt cannot be read: No such file"),
        (["--text", str(tmp_path / "broken.txt")], "broken.txt is not UTF-8 text at byte 0;"),
        (["--piece", "0"], "--piece is at least 1"),
    ):
        assert main([*words, *wrong]) == 2
        assert message in capsys.readouterr().err


class Watched(SentencePieceTokenizer):
    longest = 0

    def encode(self, texts: Sequence[str]) -> list[Any]:
        self.longest = max(self.longest, *map(len, texts))
        return super().encode(texts)


def test_a_text_has_the_tokens_that_generate_reads_from_standard_input(tmp_path: Path) -> None:
    tokenizer = Watched(model_file(tmp_path))
    content = ("größer\r\n\n    wörd " * 1000 + "a line without an end " * 4000 + "x" * 40000).encode()
    (tmp_path / "text.txt").write_bytes(content)
    found = list(text_tokens(tmp_path / "text.txt", tokenizer))
    assert 0 < tokenizer.longest <= PIECE
    assert found == [int(t) for text in texts_of(io.BytesIO(content)) for t in tokenizer.encode([text])[0]]
