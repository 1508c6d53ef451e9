import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.errors import PrepareError
from data_prep.tokenizer import ByteTokenizer, load_tokenizer

TEXT = "def f(x):\n    return x + 1  # größer\n"


def bpe_file(folder: Path, end_token: str = "<|endoftext|>") -> Path:
    """A small byte-level BPE, trained here."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[end_token], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bytes_are_the_tokens_and_256_ends_a_document() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode([TEXT])[0].tolist() == list(TEXT.encode())
    assert (tokenizer.vocabulary, tokenizer.end_of_document) == (257, 256)
    assert tokenizer.decode([*TEXT.encode(), 256, 300]) == TEXT
    assert ByteTokenizer().decode([0xE9]) == "\ufffd"


def test_a_tokenizer_file_gives_the_tokens_of_the_library(tmp_path: Path) -> None:
    path = bpe_file(tmp_path)
    tokenizer = load_tokenizer(str(path))
    tokens = tokenizer.encode([TEXT, "x"])
    assert tokens[0].tolist() == tokenizers.Tokenizer.from_file(str(path)).encode(TEXT).ids
    assert len(tokens[0]) < len(TEXT) and np.issubdtype(tokens[0].dtype, np.integer)
    assert tokenizer.decode([*tokens[0].tolist(), tokenizer.end_of_document]) == TEXT
    assert tokenizer.end_of_document == 0 and max(tokens[0]) < tokenizer.vocabulary


def test_the_end_token_written_in_a_text_ends_no_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file(tmp_path)))
    tokens = tokenizer.encode(["a<|endoftext|>b"])[0].tolist()
    assert tokenizer.end_of_document not in tokens
    assert tokenizer.decode(tokens) == "a<|endoftext|>b"


def test_an_unusual_end_token_must_be_named(tmp_path: Path) -> None:
    path = str(bpe_file(tmp_path, "[STOP]"))
    with pytest.raises(PrepareError, match=r"none of the end-of-document tokens .*; name the one .* --end-token"):
        load_tokenizer(path)
    assert load_tokenizer(path, "[STOP]").end_of_document == 0


def test_a_truncating_tokenizer_file_loses_nothing(tmp_path: Path) -> None:
    path = bpe_file(tmp_path)
    data = json.loads(path.read_text())
    data["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(data))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.decode(tokenizer.encode([TEXT])[0].tolist()) == TEXT


def test_what_is_no_tokenizer_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"nothing\.json: No such file.*give bytes or a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "nothing.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PrepareError, match=r"other\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "other.json"))
