import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME, VERSION, Manifest, TokenizerEntry, describe_file
from data_prep.tokenizer import (
    ByteTokenizer,
    from_spec,
    load_prepared_tokenizer,
    load_tokenizer,
    prepared_tokenizer,
)

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
    with pytest.raises(PrepareError, match=r"nothing\.json: No such file.*give bytes, a tokenizer\.json or"):
        load_tokenizer(str(tmp_path / "nothing.json"))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(PrepareError, match=r"other\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "other.json"))


def model_file(folder: Path, name: str = "tokenizer.model", **settings: object) -> Path:
    """A small SentencePiece model, trained here."""
    model = io.BytesIO()
    sentences = [TEXT.strip()] * 20 + [f"word{n} another{n}" for n in range(50)]
    defaults = {"vocab_size": 320, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **{**defaults, **settings}
    )
    (folder / name).write_bytes(model.getvalue())
    return folder / name


def test_a_sentencepiece_model_gives_the_tokens_of_the_library(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    tokenizer = load_tokenizer(str(path))
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    texts = ["word1 another2", "größer 漢字", ""]
    tokens = tokenizer.encode(texts)
    assert [ids.tolist() for ids in tokens] == library.encode(texts)
    assert tokenizer.vocabulary == 320 and tokenizer.end_of_document == library.piece_to_id("</s>")
    assert [tokenizer.decode([*ids.tolist(), tokenizer.end_of_document, 999]) for ids in tokens] == texts


def test_no_text_gives_the_end_or_begin_of_a_sentencepiece_model(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model_file(tmp_path)))
    tokens = tokenizer.encode(["a</s>b", "</s>", "<s> word1"])
    assert not {1, 2} & set(np.concatenate(tokens).tolist())
    assert "</s>" in tokenizer.decode(tokens[0].tolist())


def test_a_sentencepiece_model_without_an_end_needs_one_that_is_a_control_symbol(tmp_path: Path) -> None:
    path = str(model_file(tmp_path, eos_id=-1, control_symbols=["[STOP]"], user_defined_symbols=["[USER]"]))
    with pytest.raises(PrepareError, match=r"no end-of-sentence symbol; name a control symbol with --end-token"):
        load_tokenizer(path)
    with pytest.raises(PrepareError, match=r"'\[USER\]' is no control symbol; name one with --end-token"):
        load_tokenizer(path, "[USER]")
    with pytest.raises(PrepareError, match=r"no symbol '\[NONE\]'; name one it has"):
        load_tokenizer(path, "[NONE]")
    tokenizer = load_tokenizer(path, "[STOP]")
    assert tokenizer.end_of_document not in tokenizer.encode(["a[STOP]b"])[0]


def test_an_end_token_that_a_text_can_give_is_refused(tmp_path: Path) -> None:
    tokenizer = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -1.0)], 0))
    tokenizer.save(str(tmp_path / "unigram.json"))
    with pytest.raises(PrepareError, match="reads the text '</s>' in a document as the end of a document; mark the"):
        load_tokenizer(str(tmp_path / "unigram.json"))


def test_a_folder_that_holds_a_tokenizer_is_one(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match=r"holds no tokenizer\.json or tokenizer\.model; name the file itself"):
        load_tokenizer(str(tmp_path))
    model_file(tmp_path)
    assert load_tokenizer(str(tmp_path)).kind == "sentencepiece"
    bpe_file(tmp_path)
    assert load_tokenizer(str(tmp_path)).path == tmp_path / "tokenizer.json"


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_a_tokenizer_can_be_pickled_and_made_again_from_its_spec(tmp_path: Path, kind: str) -> None:
    files = {"huggingface": bpe_file, "sentencepiece": model_file}
    tokenizer = load_tokenizer(str(files[kind](tmp_path)) if kind in files else "bytes")
    for again in (pickle.loads(pickle.dumps(tokenizer)), from_spec(json.loads(json.dumps(tokenizer.spec())))):
        assert again.spec() == tokenizer.spec() and again.sha256 == tokenizer.sha256 and again.kind == kind
        for text in (TEXT, "a<|endoftext|>b</s>"):
            assert again.encode([text])[0].tolist() == tokenizer.encode([text])[0].tolist()


@pytest.mark.parametrize("kind", ["bytes", "huggingface", "sentencepiece"])
def test_a_prepared_tokenizer_is_the_one_of_the_manifest(tmp_path: Path, kind: str) -> None:
    files = {"huggingface": bpe_file, "sentencepiece": model_file}
    path = files[kind](tmp_path) if kind in files else None
    tokenizer = load_tokenizer(str(path or "bytes"))
    file = describe_file(path) if path else None
    entry = TokenizerEntry(kind, tokenizer.sha256, tokenizer.vocabulary, tokenizer.end_of_document, file)
    manifest = Manifest(VERSION, entry, "uint16", "1", {}, {}, {"train": {}, "validation": {}})
    (tmp_path / FILE_NAME).write_text(manifest.to_text())
    for stored in (prepared_tokenizer(entry, tmp_path), load_prepared_tokenizer(tmp_path)):
        assert stored.kind == kind and stored.encode([TEXT])[0].tolist() == tokenizer.encode([TEXT])[0].tolist()
    with pytest.raises(PrepareError, match="has changed: sha256 .*; prepare the data again"):
        prepared_tokenizer(replace(entry, sha256="0"), tmp_path)


def test_an_unknown_kind_of_tokenizer_in_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="unknown kind of tokenizer 'other'"):
        prepared_tokenizer(TokenizerEntry("other", "0", 1, 0, None), tmp_path)


def test_what_is_no_model_or_not_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.model").write_text("something else")
    with pytest.raises(PrepareError, match=r"a\.model is not a SentencePiece model"):
        load_tokenizer(str(tmp_path / "a.model"))
    with pytest.raises(PrepareError, match="must be a local file; copy it here first"):
        load_tokenizer("s3://bucket/tokenizer.json")
