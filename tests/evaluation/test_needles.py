"""Needles: texts are what they say, and what is found is what a plain model says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.tokenizer import ByteTokenizer, load_tokenizer
from tests.data.corpus import prepare_folder
from tests.data_prep.test_tokenizer import bpe_file
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main
from titans_train.config.schema import Needles
from titans_train.data.needles import NeedlesTask
from titans_train.data.sample import IGNORE
from titans_train.errors import UserError
from titans_train.evaluation.grid import depths_of, over_depths, row
from titans_train.evaluation.needles import KINDS, WORDS, NeedleTask
from titans_train.evaluation.needles_task import TokenNeedles

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
    with pytest.raises(UserError, match="question take 366 tokens of this tokenizer, but texts of 64 are wanted"):
        NeedleTask("passkey", ByteTokenizer()).sample(64, [0.5], [0])
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


def test_the_verb_looks_for_needles_in_text(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(config(tmp_path / "runs", data={"path": str(prepared)}))
    (tmp_path / "hay.txt").write_text(HAYSTACK)
    picture = tmp_path / "needles.png"
    found = evaluated(
        tmp_path, str(checkpoint), "--task", "needles", "--kinds", "passkey", "uuid", "--lengths", "600", "700",
        "--depths", "2", "--cases", "2", "--haystack", str(tmp_path / "hay.txt"), "--picture", str(picture),
    )  # fmt: skip
    assert set(found["needles"]) == {"passkey", "uuid"} and found["block"] == "mag" and found["step"] == 10
    assert [(r["length"], r["cases"]) for r in found["needles"]["uuid"]] == [(600, 4), (700, 4)]
    assert [r["depth"] for r in found["by_depth"]["passkey"]] == [0.0, 1.0] * 2
    assert (
        picture.read_bytes().startswith(b"\x89PNG") and "uuid: 2 texts at each of 2 depths" in capsys.readouterr().out
    )


def test_the_verb_looks_for_the_needles_a_run_was_trained_on(tmp_path: Path) -> None:
    data = {"source": "needles", "path": None, "needles": {"keys": 4, "digits": 1, "symbols": 2, "words": 5}}
    checkpoint = write_checkpoint(config(tmp_path / "runs", "mac", data=data), tokenizer=None)
    found = evaluated(
        tmp_path, str(checkpoint), "--task", "needles", "--lengths", "16", "64", "--depths", "3", "--cases", "20"
    )
    for r in found["needles"]["tokens"]:
        assert r["cases"] == 60 and 0 <= r["accuracy"] < 0.9  # one of two symbols, if anything
