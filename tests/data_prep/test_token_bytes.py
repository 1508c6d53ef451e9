"""Bytes of text by token: together those of the text that the tokens decode to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from data_prep.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data_prep.test_tokenizer import bpe_file, model_file
from tests.inference.test_text import fallback_file

TEXTS = ["word1 another2 größer 漢字 🙂\n x", "abc the quick brown fox", "return x + 1  # größer\n", "漢", ""]


def prefixed(folder: Path) -> Path:
    """Byte-level, with a space in front of every text, and a token that a user has added."""
    tokenizer = tokenizers.Tokenizer.from_file(str(bpe_file(folder)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.add_tokens(["漢字"])
    path = folder / "prefixed.json"
    tokenizer.save(str(path))
    return path


def made(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return ByteTokenizer()
    if kind in ("sentencepiece", "unigram"):
        return SentencePieceTokenizer(model_file(folder, model_type="unigram" if kind == "unigram" else "bpe"))
    path = {"bpe": bpe_file, "prefixed": prefixed, "fallback": fallback_file}[kind](folder)
    return HuggingFaceTokenizer(path, "</s>" if kind == "fallback" else None)


def counted(tokenizer: Tokenizer, text: str) -> float:
    table, ids = tokenizer.bytes_of_tokens(), tokenizer.encode([text])[0].tolist()
    assert table is not None and table.shape == (tokenizer.vocabulary, 2)
    return float(sum(table[token, int(place == 0)] for place, token in enumerate(ids)))


@pytest.mark.parametrize("kind", ["bytes", "bpe", "prefixed", "fallback", "sentencepiece", "unigram"])
def test_the_bytes_of_a_texts_tokens_are_those_of_the_text(kind: str, tmp_path: Path) -> None:
    tokenizer = made(kind, tmp_path)
    for text in TEXTS:
        whole = text if kind == "prefixed" else tokenizer.decode(tokenizer.encode([text])[0].tolist())
        assert counted(tokenizer, text) == len(whole.encode()), text
    table = tokenizer.bytes_of_tokens()
    assert table is not None and not table[tokenizer.end_of_document].any()
    assert np.isfinite(table).sum() >= 2 * (tokenizer.vocabulary - 1)


def test_the_bytes_of_unknown_text_are_not_known(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(model_file(tmp_path, byte_fallback=False, vocab_size=60))
    assert counted(tokenizer, "word1 word2") == 11
    assert np.isnan(counted(tokenizer, "word1 漢"))
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "is": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "words.json")
    assert counted(tokenizer, "a is a") == 6 and np.isnan(counted(tokenizer, "a was a"))
