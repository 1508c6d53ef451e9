"""Text of tokens as they come: the same text as of all at once, never half a character, ended by stop texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, trainers

from data_prep.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data_prep.test_tokenizer import bpe_file
from titans_train.inference import TextStream

TEXT = "größer ∞ 🙂🙂 abc\n\n  déjà vu " * 9 + "end"
Factory = pytest.TempPathFactory


def sentencepiece_file(folder: Path) -> Path:
    """With pieces for bytes, so that characters it has not seen are divided."""
    corpus = folder / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\nabc end vu\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "sp"), vocab_size=300, byte_fallback=True, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    return folder / "sp.model"


def fallback_file(folder: Path) -> Path:
    """As Llama's tokenizer.json: metaspace, and bytes where a character is not known."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    pieces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(pieces)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the▁quick▁brown▁fox▁abc▁end▁vu"] * 20, trainer)
    path = folder / "fallback.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece", "fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "bpe":
        return HuggingFaceTokenizer(bpe_file(folder))
    if request.param == "fallback":
        return HuggingFaceTokenizer(fallback_file(folder), "</s>")
    return SentencePieceTokenizer(sentencepiece_file(folder))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return [int(i) for i in tokenizer.encode([text])[0]]


def test_pieces_are_the_text_and_never_half_a_character(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, TEXT)
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.close() == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces) and len([p for p in pieces if p]) > 40
    assert stream.count == len(ids) and stream.finish is None


def test_text_goes_on_after_a_prompt_as_if_it_were_one(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, TEXT)
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids), 7):
        before = tokenizer.decode(ids[:cut])
        if before.endswith("\ufffd") or not whole.startswith(before):
            continue
        stream = TextStream(tokenizer, ids[:cut])
        assert before + "".join(map(stream.add, ids[cut:])) + stream.close() == whole


def test_a_text_cut_inside_a_character_shows_that_at_its_end() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.add(byte) for byte in "a🙂".encode()[:-1]] == ["a", "", "", ""]
    assert stream.close() == "\ufffd"


def test_bytes_that_are_no_text_give_what_decoding_them_at_once_gives() -> None:
    tokenizer, rng = ByteTokenizer(), random.Random(0)
    for _ in range(50):
        tokens = [rng.choice([rng.randrange(257), *"é🙂".encode()]) for _ in range(300)]
        stream = TextStream(tokenizer, tokens[:9])
        made = "".join(map(stream.add, tokens)) + stream.close()
        assert made.replace("\ufffd", "") == tokenizer.decode(tokens).replace("\ufffd", "")
        alone = TextStream(tokenizer)
        assert "".join(map(alone.add, tokens)) + alone.close() == tokenizer.decode(tokens)


@pytest.mark.parametrize("stops", [["STOP"], ["STOP", "never"], ["P here", "STOP"], ["ST", "STOP"], ["and STOP"]])
def test_a_text_ends_before_the_first_stop_text_wherever_tokens_divide_it(
    tokenizer: Tokenizer, stops: list[str]
) -> None:
    text = "one two S ST STO and STOP here STOP"
    stream, made, ids = TextStream(tokenizer, stops=stops), "", ids_of(tokenizer, text)
    given = tokenizer.decode(ids)  # some tokenizers do not know every letter
    for token in ids:
        piece = stream.add(token)
        made += piece
        assert not any(stop in made for stop in stops)
        if stream.finish:
            break
    expected = min(given.find(stop) for stop in stops if stop in given)
    assert (made, stream.finish, stream.close()) == (given[:expected], "stop", "")
    assert stream.add(ids[0]) == "" and stream.count <= len(ids)


def test_what_might_have_been_a_stop_text_is_shown_when_it_is_none() -> None:
    stream = TextStream(ByteTokenizer(), stops=["\n\n"])
    assert [stream.add(byte) for byte in b"a\nb\n"] == ["a", "", "\nb", ""]
    assert stream.close() == "\n"


def test_the_end_of_a_document_ends_a_text_where_asked() -> None:
    for at_end, expected in ((True, ("ab", "end", 3)), (False, ("abc", None, 4))):
        stream = TextStream(ByteTokenizer(), at_end=at_end)
        made = "".join(map(stream.add, [97, 98, 256, 99]))
        assert (made + stream.close(), stream.finish, stream.count) == expected


def test_bytes_that_stay_no_text_are_shown_after_a_while_and_nothing_twice(tokenizer: Tokenizer) -> None:
    whole = ids_of(tokenizer, "🙂" * 3)
    whole = whole[len(whole) % 4 :]  # SentencePiece begins with a space
    assert len(whole) == 12
    bad = whole[:4] + whole[:1] * 40 + ids_of(tokenizer, "abc") * 30 + whole[:2]
    stream = TextStream(tokenizer)
    made = "".join(map(stream.add, bad))
    assert made.startswith("🙂") and made.count("abc") == 30 and "\ufffd" * 20 in made
    assert stream.close().strip("\ufffd") == "" and stream.close() != ""


def test_tokens_without_text_are_forgotten() -> None:
    stream = TextStream(ByteTokenizer())
    assert stream.add(97) == "a" and not any(map(stream.add, [256] * 500))
    assert len(stream._tokens) < 100 and stream.add(98) == "b"
