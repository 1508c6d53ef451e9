"""Standard input: read as it comes, cut where its text says, whatever pieces it comes in."""

from __future__ import annotations

import io
import random
from pathlib import Path

import pytest

from data_prep.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from tests.data_prep.test_tokenizer import TEXT, bpe_file
from tests.inference.test_generate import build
from tests.inference.test_prefill import apart
from titans_train.errors import UserError
from titans_train.inference import read, read_stream
from titans_train.inference.incoming import texts_of


class Arriving(io.BytesIO):
    """Gives a few bytes at a time."""

    def __init__(self, content: bytes, seed: int = 0) -> None:
        super().__init__(content)
        self.rng = random.Random(seed)

    def read1(self, size: int | None = -1, /) -> bytes:
        return self.read(self.rng.randrange(1, 9))


CONTENT = ("größer ∞ 🙂 words\n\n    indented\r\n" * 20 + "x" * 100 + " y" * 90).encode()


def test_pieces_follow_from_the_text_and_not_from_how_it_arrives() -> None:
    found = [list(texts_of(stream, 64)) for stream in (io.BytesIO(CONTENT), Arriving(CONTENT), Arriving(CONTENT, 1))]
    assert found[0] == found[1] == found[2]
    assert "".join(found[0]) == CONTENT.decode() and max(map(len, found[0])) <= 64
    lines = [piece for piece in found[0] if "words" in piece][:-1]
    assert len(lines) > 5
    for piece, following in zip(lines, lines[1:], strict=False):
        assert piece.endswith("\n") and not following[0].isspace()


def test_a_byte_level_tokenizer_gives_the_tokens_of_the_whole_text(tmp_path: Path) -> None:
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(bpe_file(tmp_path))):
        text = TEXT * 30
        tokens = [int(t) for piece in texts_of(Arriving(text.encode()), 100) for t in tokenizer.encode([piece])[0]]
        assert tokens == [int(t) for t in tokenizer.encode([text])[0]]


def test_a_stream_is_read_like_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mag")
    monkeypatch.setattr("titans_train.inference.incoming.PIECE", 50)
    reading, count = read_stream(model, ByteTokenizer(), Arriving(CONTENT))
    whole = read(model, list(CONTENT))
    assert count == len(CONTENT)
    assert (reading.logits - whole.logits).abs().max() < 1e-10 and apart(reading.state, whole.state) < 1e-10
    further, count = read_stream(model, ByteTokenizer(), Arriving(b"more"), reading)
    assert (further.logits - read(model, list(CONTENT + b"more")).logits).abs().max() < 1e-10 and count == 4


def test_what_is_no_text_is_refused_with_its_place() -> None:
    model = build("lmm")
    with pytest.raises(UserError, match="no text on standard input"):
        read_stream(model, ByteTokenizer(), io.BytesIO())
    broken = "größer".encode() * 30 + b"\xff abc"
    for stream in (io.BytesIO(broken), Arriving(broken)):
        with pytest.raises(UserError, match="not UTF-8 text at byte 240;"):
            list(texts_of(stream))
    with pytest.raises(UserError, match="not UTF-8 text at byte 4;"):
        list(texts_of(Arriving("abcd🙂".encode()[:-1])))
