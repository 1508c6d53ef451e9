"""Needles: texts are what they say, and what is found is what a plain model says."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from data_prep.train_tokenizer import main as train_bpe
from tests.data.corpus import prepare_folder
from tests.data_prep.test_tokenizer import bpe_file, model_file
from tests.inference.checkpoints import config, write_checkpoint
from tests.models.shapes import tiny
from titans_train.__main__ import main
from titans_train.config.schema import Needles
from titans_train.data.needles import NeedlesTask
from titans_train.data.sample import IGNORE
from titans_train.errors import UserError
from titans_train.evaluation.grid import depths_of, grid, heat_map, over_depths, row
from titans_train.evaluation.haystack import NEAR_SHARE, NEAR_TOKENS
from titans_train.evaluation.needles import FRAME, KINDS, NOISE, QUESTION, WORDS, NeedleTask
from titans_train.evaluation.needles_task import TokenNeedles
from titans_train.evaluation.scoring import Scorer
from titans_train.models import LanguageModel
from titans_train.parallel import process_group

Capture = pytest.CaptureFixture[str]
HAYSTACK = "".join(f"Sentence {n} tells of {n * 7} things, none of them magic. " for n in range(40))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", ["bytes", "byte pairs"])
def test_a_text_has_exactly_the_tokens_asked_for_with_the_needle_at_its_depth(
    kind: str, tokenizer: str, tmp_path: Path
) -> None:
    text = load_tokenizer("bytes" if tokenizer == "bytes" else str(bpe_file(tmp_path)))
    task = NeedleTask(kind, text, HAYSTACK)
    places = []
    for depth in (0.0, 0.5, 1.0):
        for number in range(3):
            needle = task.needle(1500, depth, number)
            assert len(needle.tokens) == 1500
            whole = text.decode(needle.tokens)
            assert needle.text in whole and whole.endswith(f" {needle.value}")
            assert text.decode(needle.tokens[-needle.answer :]).strip() == needle.value
            asked = whole.rsplit("What is the special magic", 1)[1]
            (key,) = set(re.findall(r"for (\S+) mentioned", asked))
            assert key in WORDS and f"for {key} is: {needle.value}." in needle.text
            assert whole.count(needle.value) == 2
        places.append(whole.index(needle.text) / len(whole))
    assert places[0] < 0.2 < places[1] < 0.7 < places[2]


# each space counts, and a line's end is a byte
AS_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
HAYSTACKS = {
    "sentences": HAYSTACK,
    "paragraphs": "Is it so? It is!\n\nThen\tso be it. " * 30,
    "one long line": "words without an end " * 300,
    "lines without a full stop": "Wörter ohne Punkt\n" * 100,
    "Chinese": "天空是蓝色的。草是绿色的。" * 60,
    "Chinese without a full stop": "".join(random.Random(0).choices("天空是蓝色的草绿", k=5000)),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The project's own byte pairs, and a SentencePiece model, which has a sign for a word's beginning."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "corpus.txt").write_text("\n".join([FRAME, NOISE, QUESTION, *HAYSTACKS.values()] * 2), "utf-8")
    options = ["--input", str(folder / "corpus.txt"), "--output", str(folder / "tokenizer.json"), "--vocabulary", "600"]
    assert train_bpe(options) == 0
    return {
        "bytes": ByteTokenizer(),
        "byte pairs": load_tokenizer(str(folder / "tokenizer.json")),
        "sentencepiece": load_tokenizer(str(model_file(folder))),
        "sentencepiece as Llama's": load_tokenizer(str(model_file(folder, "llama.model", **AS_LLAMA))),
    }


@pytest.mark.parametrize("name", ["bytes", "byte pairs", "sentencepiece", "sentencepiece as Llama's"])
@pytest.mark.parametrize("hay", ["passkey", *HAYSTACKS])
def test_the_needle_is_at_its_depth_and_all_is_read_as_one_text(
    hay: str, name: str, tokenizers: dict[str, Tokenizer]
) -> None:
    text = tokenizers[name]
    kind = "passkey" if hay == "passkey" else "number"
    task = NeedleTask(kind, text, HAYSTACKS.get(hay))
    for number, depth in enumerate((0.0, 0.2, 0.5, 0.77, 1.0)):
        needle = task.needle(1200, depth, number)
        whole = text.decode(needle.tokens)
        assert len(needle.tokens) == 1200 and whole.count(needle.text) == 1
        frame, before = len(text.encode([FRAME.format(one="number")])[0]), whole[: whole.index(needle.text)].rstrip()
        question = whole[whole.rindex("What is") - 1 :]
        free = 1200 - frame - len(text.encode([needle.text])[0]) - len(text.encode([question])[0])
        place = (len(text.encode([before])[0]) - frame) / free
        assert abs(place - depth) < max(NEAR_SHARE, NEAR_TOKENS / free) + 0.01
        # two tokens side by side that the text as a whole does not have: where the haystack is cut
        natural = [int(t) for t in text.encode([whole])[0]]
        strange = Counter(pairwise(needle.tokens)) - Counter(pairwise(natural))
        assert strange.total() <= 8
        answer = text.encode([whole[: -len(needle.value) - 1]])[0]
        assert needle.tokens[-needle.answer :] == natural[len(answer) :]


def test_the_needle_stands_between_sentences_where_they_are_near() -> None:
    task = NeedleTask("number", ByteTokenizer(), HAYSTACK)
    for number in range(20):
        needle = task.needle(4096, 0.05 * number, number)
        before, after = ByteTokenizer().decode(needle.tokens).split(needle.text)
        assert before[-2:] in (". ", ".\n") and after[0] in " \n"


def test_the_words_are_rulers_for_a_single_needle() -> None:
    text = ByteTokenizer().decode(NeedleTask("passkey", ByteTokenizer()).needle(1000, 0.5, 0).tokens)
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the number afterwards.\n{NOISE}\n{NOISE}\n"
    )
    assert re.search(r"\WOne of the special magic numbers for \w+-\w+ is: \d{7}\.\s", text) and ".." not in text
    uuids = ByteTokenizer().decode(NeedleTask("uuid", ByteTokenizer(), HAYSTACK).needle(1000, 0.5, 0).tokens)
    assert uuids.startswith("A special magic uuid is hidden") and "One of the special magic uuids for" in uuids


def test_a_word_is_never_its_own_key() -> None:
    task = NeedleTask("word", ByteTokenizer(), "x.", 0)
    for number in range(1000):
        needle = task.needle(500, 0.5, number)
        assert needle.value not in needle.text.split(" is: ")[0]


def test_labels_are_at_the_answer_alone_and_texts_depend_on_seed_and_number() -> None:
    task = NeedleTask("passkey", ByteTokenizer())
    sample = task.sample(600, [0.0, 1.0], [0, 1, 2])
    assert sample.tokens.shape == sample.labels.shape == (3, 599)
    for labels in sample.labels:
        places = (labels != IGNORE).nonzero().flatten().tolist()
        assert places == list(range(591, 599))  # a space and 7 digits
        assert re.fullmatch(r" \d{7}", ByteTokenizer().decode(labels[places].tolist()))
    again = task.sample(600, [0.0, 1.0], [2])
    assert torch.equal(again.tokens[0], sample.tokens[2])
    other = NeedleTask("passkey", ByteTokenizer(), seed=1).sample(600, [0.0, 1.0], [2])
    assert not torch.equal(other.tokens, again.tokens)


def test_a_text_too_short_and_a_missing_haystack_are_refused() -> None:
    with pytest.raises(UserError, match="question take 359 tokens of this tokenizer, but texts of 64 are wanted"):
        NeedleTask("passkey", ByteTokenizer()).sample(64, [0.5], [0])
    with pytest.raises(UserError, match="texts of 64 are wanted"):
        NeedleTask("passkey", ByteTokenizer()).check(64, 1)
    with pytest.raises(UserError, match="give --haystack FILE"):
        NeedleTask("uuid", ByteTokenizer())


def test_tokens_as_needles_lie_at_their_depth_and_are_asked_for_at_the_end() -> None:
    settings = Needles(needles=3, keys=8, digits=2, symbols=5, words=20)
    task = NeedlesTask(settings)
    for number in range(20):
        tokens, labels = task.draw((0, number), 60, depth=0.25)
        marks = (tokens == 0).nonzero()[0]
        assert len(marks) == 3 and tokens[-4] == 1  # question
        needles = {int(tokens[m + 1]): tokens[m + 2 : m + 4].tolist() for m in marks}
        key = int(tokens[-3])
        assert len(needles) == 3 and needles[key] == tokens[-2:].tolist()
        assert labels[-3:-1].tolist() == tokens[-2:].tolist() and (labels != IGNORE).sum() == 2
        words = [t for m, t in enumerate(tokens.tolist()) if t >= 2 + 8 + 5]
        assert len(words) == 60 - 4 * 4 and max(words) < 2 + 8 + 5 + 20
        before = next(m for m in marks if tokens[m + 1] == key)
        assert sum(t >= 15 for t in tokens[:before]) == round(0.25 * 44)
    with pytest.raises(UserError, match="sequences have 12"):
        TokenNeedles(task, 0, 100).sample(12, [0.5], [0])


def test_accuracy_comes_with_its_interval() -> None:
    rows = [row(100, 0.0, 3, 4), row(100, 1.0, 4, 4), row(200, 0.0, 0, 4), row(200, 1.0, 1, 4)]
    assert depths_of(5) == [0.0, 0.25, 0.5, 0.75, 1.0] and depths_of(1) == [0.5]
    first, second = over_depths(rows)
    assert (first["right"], first["cases"], second["accuracy"]) == (7, 8, 1 / 8)
    assert 0.5 < first["low"] < 7 / 8 < first["high"] < 1


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


def evaluated(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main(["evaluate", *words, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_the_verb_looks_for_needles_in_text(prepared: Path, tmp_path: Path, capsys: Capture) -> None:
    checkpoint = write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))
    (tmp_path / "hay.txt").write_text(HAYSTACK)
    picture = tmp_path / "needles.png"
    found = evaluated(
        tmp_path, str(checkpoint), "--task", "needles", "--kinds", "passkey", "uuid", "--lengths", "600", "700", "600",
        "--depths", "2", "--cases", "2", "--haystack", str(tmp_path / "hay.txt"), "--picture", str(picture),
    )  # fmt: skip
    assert set(found["needles"]) == {"passkey", "uuid"} and found["block"] == "mag" and found["step"] == 10
    assert [(r["length"], r["cases"]) for r in found["needles"]["uuid"]] == [(600, 4), (700, 4)]
    assert [r["depth"] for r in found["by_depth"]["passkey"]] == [0.0, 1.0] * 2
    assert (
        picture.read_bytes().startswith(b"\x89PNG") and "uuid: 2 texts at each of 2 depths" in capsys.readouterr().out
    )


def test_the_verb_looks_for_the_needles_a_run_was_trained_on(tmp_path: Path, capsys: Capture) -> None:
    data = {"source": "needles", "path": None, "needles": {"keys": 4, "digits": 1, "symbols": 2, "words": 5}}
    checkpoint = write_checkpoint(config(tmp_path / "runs", "mac", data=data), tokenizer=None)
    found = evaluated(
        tmp_path, str(checkpoint), "--task", "needles", "--lengths", "16", "64", "16", "--depths", "3", "--cases", "20"
    )
    assert [r["length"] for r in found["needles"]["tokens"]] == [16, 64]
    for r in found["needles"]["tokens"]:
        assert r["cases"] == 60 and 0 <= r["accuracy"] < 0.9  # one of two symbols, if anything
    (tmp_path / "hay.txt").write_text(HAYSTACK)
    command = ["evaluate", str(checkpoint), "--task", "needles", "--lengths", "16"]
    for words in (["--kinds", "uuid"], ["--haystack", str(tmp_path / "hay.txt")]):
        assert main([*command, *words]) == 2
        assert f"{words[0]} is for needles in text" in capsys.readouterr().err


def test_a_length_that_cannot_be_is_told_before_anything_is_measured(
    prepared: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoint = write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))
    assert main(["evaluate", str(checkpoint), "--task", "needles", "--lengths", "600", "10"]) == 2
    told = capsys.readouterr()
    assert "texts of 10 are wanted" in told.err and told.out == ""


def test_a_length_given_twice_counts_once() -> None:
    task = TokenNeedles(NeedlesTask(Needles(keys=4, digits=1, symbols=2, words=5)), 0, 29)
    with process_group() as mesh:
        rows = grid(Scorer(LanguageModel(tiny("lmm")), mesh, batch=4), task, [16, 16], [0.5], 4)
    assert [(r["length"], r["cases"]) for r in rows] == [(16, 4)]


def test_cells_that_were_not_measured_stay_empty(tmp_path: Path) -> None:
    picture = tmp_path / "p.svg"
    heat_map({"a": {("qa1", "0k"): 0.25, ("qa1", "1k"): None, ("qa2", "1k"): 0.75}}, picture, "t", "task", "length")
    drawn = picture.read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("25%", "75%", "qa1", "qa2", "0k", "1k"))
    assert drawn.count("%") == 2
