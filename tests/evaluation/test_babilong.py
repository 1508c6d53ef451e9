"""BABILong: prompts, reader, accuracy, and the generator of the same kind of task."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_prep.tokenizer import ByteTokenizer, load_tokenizer
from tests.data_prep.test_tokenizer import model_file
from tests.evaluation.knowing import knowing
from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main
from titans_train.errors import UserError
from titans_train.evaluation.babilong import TaskFile, evaluate, find_files, tokens_of
from titans_train.evaluation.babilong_make import MOVES, PERSONS, PLACES, TAKES, Maker, _options
from titans_train.evaluation.babilong_make import main as make
from titans_train.evaluation.babilong_make import make as make_files
from titans_train.evaluation.babilong_prompts import around
from titans_train.evaluation.cases import padded
from titans_train.evaluation.encoding import pieces
from titans_train.evaluation.scoring import Scorer
from titans_train.parallel import process_group

HAYSTACK = "It was a dark night. The rain fell in torrents! Mary had gone? A gust of wind checked it. " * 3
TOKENIZER = ByteTokenizer()
AS_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
Record = dict[str, str]


def record(text: str = "Mary went to the garden.", question: str = "Where is Mary? ", target: str = "garden") -> Record:
    return {"input": text, "question": question, "target": target}


# of what stands before the context in babilong/prompts.py of github.com/booydar/babilong at 7a6efee
PUBLISHED = {
    "qa1": "1d03af51c4f80f33",
    "qa2": "e1558aeca35cc9c9",
    "qa3": "c3e52b02a567d2f2",
    "qa4": "e512293076c80707",
    "qa5": "73dc32700a7ea822",
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_prompts_are_the_benchmarks_word_for_word(task: str) -> None:
    before, after = around(task, "? ")
    assert hashlib.sha256(before.encode()).hexdigest()[:16] == PUBLISHED[task]
    assert after == "\n</context>\n\nQuestion: ?\nAnswer:"


def test_the_answers_sentence_is_begun_where_the_benchmark_wants_one() -> None:
    for task, question, lead in [
        ("qa1", "Where is Mary? ", " The most recent location of Mary is"),
        ("qa2", "Where is the milk?", " The milk is in the"),
        ("qa3", "Where was the apple before the garden? ", " Before the garden the apple was in the"),
        ("qa4", "What is north of the garden?", ""),
        ("qa1", "Who is {0}?", ""),
        ("qa7", "How many objects is Mary carrying?", ""),
    ]:
        assert around(task, question)[1] == f"\n</context>\n\nQuestion: {question.strip()}\nAnswer:{lead}"
        assert around(task, question, "bare") == (
            "<context>\n",
            f"\n</context>\n\nQuestion: {question.strip()}\nAnswer:",
        )
    assert "hidden in some random text" in around("qa17", "?")[0]


RECORDS = [record(), record("x" * (3 << 20), target="ünï"), record('a "quoted\\" {brace}]', target="b"), record("")]
WRITTEN = {
    "a list": json.dumps(RECORDS),
    "a list over lines": "\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
    "lines": "".join(json.dumps(r) + "\n" for r in RECORDS),
    "lines without the last end": "\r\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_records_are_read_from_lists_and_lines_and_in_any_order(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(WRITTEN[name].encode())
    file = TaskFile("qa1", "4k", path)
    assert [file.record(n) for n in (3, 1, 0, 2)] == [RECORDS[n] for n in (3, 1, 0, 2)]
    assert len(file.places) == 4 and len(TaskFile("qa1", "4k", path, 2).places) == 2


def test_files_are_found_by_task_and_length_in_both_layouts(tmp_path: Path) -> None:
    for name in (
        "qa1/4k.json",
        "qa1/0k.jsonl",
        "qa10/1M.json",
        "128k/qa2.json",
        "4k/qa2.jsonl",
        "qa1/notes.json",
        "x/y.json",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps([record()]))
    assert [(f.task, f.length) for f in find_files(tmp_path, ["qa2", "qa1"], ["4k"])] == [("qa2", "4k"), ("qa1", "4k")]
    assert [(f.task, f.length) for f in find_files(tmp_path, ["qa2"] * 2, ["4k"] * 2)] == [("qa2", "4k")]
    there = [("qa1", "0k"), ("qa1", "4k"), ("qa2", "4k"), ("qa2", "128k"), ("qa10", "1M")]
    assert [(f.task, f.length) for f in find_files(tmp_path)] == there
    assert [(f.task, f.length) for f in find_files(tmp_path, ["qa10", "qa1"])] == [there[0], there[1], there[4]]
    assert [(f.task, f.length) for f in find_files(tmp_path, [], ["1M", "4k"])] == [there[4], there[1], there[2]]
    for tasks, lengths, problem in (
        (["qa2", "qa1"], ["4k", "0k"], "no file for qa2/0k;"),
        (["qa1", "qa3"], [], "no file for qa3/any length;"),
        ([], ["4k", "2k"], "no file for any task/2k;"),
    ):
        with pytest.raises(UserError, match=problem):
            find_files(tmp_path, tasks, lengths)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="any task/any length; it has nothing"):
        find_files(tmp_path / "empty")
    (tmp_path / "4k" / "qa1.json").write_text("[]")
    with pytest.raises(UserError, match="keep one"):
        find_files(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        find_files(tmp_path / "none")


def test_a_text_in_pieces_has_the_tokens_of_the_whole() -> None:
    text = " ".join(HAYSTACK.split()) + "\n\nThe end\n"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    whole = bpe.encode(text).ids
    assert len(whole) < len(text) / 2
    for size in (7, 40, 100, 10**6):
        parts = pieces(text, size)
        assert "".join(parts) == text and all(len(part) <= size for part in parts)
        if size > 20:  # words fit
            assert sum((bpe.encode(part).ids for part in parts), []) == whole
    assert pieces("abcdefgh", 3) == ["abc", "def", "gh"] and pieces("", 3) == [""]


def test_the_answer_is_what_the_labels_ask_for_and_padding_stands_behind_it() -> None:
    cases = [tokens_of(TOKENIZER, "qa1", r, "original") for r in (record(), record("Mary " * 9, target=" office "))]
    sample = padded(cases)
    for row, (tokens, answer) in enumerate(cases):
        text = TOKENIZER.decode(tokens.tolist())
        word = ("garden", "office")[row]
        assert text.endswith(f"Question: Where is Mary?\nAnswer: The most recent location of Mary is {word}")
        assert answer == len(word) + 1 and sample.tokens.shape[1] == max(len(t) for t, _ in cases) - 1
        assert np.array_equal(sample.tokens[row, : len(tokens) - 1].numpy(), tokens[:-1])
        asked = sample.labels[row] != -100
        assert TOKENIZER.decode(sample.labels[row][asked].tolist()) == f" {word}"
        assert asked.nonzero()[-1] == len(tokens) - 2


def test_an_answer_has_the_tokens_that_it_has_behind_the_question(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(model_file(tmp_path, **AS_LLAMA)))
    tokens, answer = tokens_of(tokenizer, "qa1", record(target="word7"), "bare")
    alone = tokenizer.encode([" word7"])[0]
    assert tokenizer.decode(tokens[-answer:].tolist()) == "word7" and answer == len(alone) - 1
    whole = "<context>\nMary went to the garden.\n</context>\n\nQuestion: Where is Mary?\nAnswer: word7"
    assert tokens.tolist() == tokenizer.encode([whole])[0].tolist()


@pytest.mark.parametrize("block", ["lmm", "mag", "mac", "transformer"])
def test_accuracy_and_loss_are_those_of_a_plain_computation(block: str, tmp_path: Path) -> None:
    records = [record("x" * 5, target="a"), record("y" * 40, target="b"), record("", target="a"), record(target="ab")]
    (tmp_path / "file").write_text(json.dumps(records))
    file, model = TaskFile("qa9", "0k", tmp_path / "file"), knowing(block)
    right, losses, count = 0, 0.0, 0
    for r in records:
        tokens, answer = tokens_of(TOKENIZER, "qa9", r, "bare")
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[:-1])[None]).logits[0, -answer:]
        want = torch.from_numpy(tokens[-answer:])
        right += bool((logits.argmax(-1) == want).all())
        losses += float(torch.nn.functional.cross_entropy(logits, want, reduction="sum"))
        count += answer
    assert right == 2
    with process_group() as mesh:
        for batch in (1, 3):
            row = evaluate(Scorer(model, mesh, batch), file, TOKENIZER, "bare")
            assert (row["right"], row["samples"], row["accuracy"]) == (2, 4, 0.5)
            assert row["loss"] == pytest.approx(losses / count, rel=1e-10)
            assert 0.14 < row["low"] < 0.16 and 0.84 < row["high"] < 0.86


def simulated(text: str, question: str) -> str:
    """The answer by following the facts of a text, whatever stands between them."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    seen: dict[str, list[str]] = {}
    people, verbs = "|".join(PERSONS), "|".join(MOVES)
    pattern = rf"({people}) (?:({verbs}) the (\w+)|(\w+(?: up)?) the (\w+) there|(\w+(?: down)?) the (\w+))\."
    for person, move, place, take, taken, _, dropped in re.findall(pattern, text):
        if move:
            where[person] = place
        elif take:
            assert take in TAKES and taken not in holder
            assert seen.get(taken, [where[person]])[-1] == where[person], "what is taken lies there"
            holder[taken] = person
        else:
            assert holder.pop(dropped) == person
        for thing, by in holder.items():
            if not (been := seen.setdefault(thing, [])) or been[-1] != where[by]:
                been.append(where[by])
    asked = re.findall(r"\w+", question)
    if asked[1] == "was":
        assert seen[asked[3]][-1] == asked[-1]
        return seen[asked[3]][-2]
    return seen[asked[-1]][-1] if "the" in asked else where[asked[-1]]


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_made_answers_are_those_of_the_world_that_the_text_tells(task: str) -> None:
    maker = Maker(task, TOKENIZER, HAYSTACK, seed=3)
    targets = set()
    for length in (0, 3000):
        for n in range(60):
            made = maker.record(length, n)
            assert simulated(made["input"], made["question"]) == made["target"]
            assert (len(made["input"]) > length - 60 and len(made["input"]) <= length) or not length
            assert "Mary had gone" not in made["input"] and ("torrents" in made["input"]) == bool(length)
            targets.add(made["target"])
    assert targets == set(PLACES)
    assert maker.record(3000, 5) == Maker(task, TOKENIZER, HAYSTACK, seed=3).record(3000, 5)
    assert maker.record(3000, 5) != Maker(task, TOKENIZER, HAYSTACK, seed=4).record(3000, 5)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "hay.txt").write_text(HAYSTACK)
    for task in ("qa1", "qa2"):
        options = ["--haystack", str(tmp_path / "hay.txt"), "--task", task, "--lengths", "0k", "2k", "--count", "3"]
        assert make(["--out", str(tmp_path / "made"), *options]) == 0
    return tmp_path / "made"


def test_the_command_reads_what_the_generator_writes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(p.name for p in (made / "qa1").iterdir()) == ["0k.jsonl", "2k.jsonl"]
    checkpoint = write_checkpoint(config(tmp_path / "runs"))
    figures, picture = tmp_path / "f.json", tmp_path / "p.png"
    capsys.readouterr()
    options = ["--folder", str(made), "--samples", "2", "--json", str(figures), "--picture", str(picture)]
    (made / "qa2" / "2k.jsonl").rename(made / "qa2" / "4k.jsonl")
    assert main(["evaluate", str(checkpoint), "--task", "babilong", *options]) == 0
    result: dict[str, Any] = json.loads(figures.read_text())
    assert [(r["task"], r["length"], r["samples"]) for r in result["results"]] == [
        ("qa1", "0k", 2), ("qa2", "0k", 2), ("qa1", "2k", 2), ("qa2", "4k", 2),
    ]  # fmt: skip
    assert result["prompt"] == "original" and result["step"] == 10
    assert all(r["low"] <= r["accuracy"] <= r["high"] and r["loss"] > 0 for r in result["results"])
    first = TaskFile("qa1", "2k", made / "qa1" / "2k.jsonl").record(0)
    assert result["results"][2]["tokens"] == len(tokens_of(TOKENIZER, "qa1", first, "original")[0])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines if line and line[0].startswith("qa")] == [
        [r["task"], r["length"]] for r in result["results"]
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_generator_refuses_what_cannot_be_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hay, out = tmp_path / "hay.txt", tmp_path / "out"
    hay.write_text(HAYSTACK)
    (tmp_path / "named.txt").write_text("Mary. John went home.")
    for options, problem in [
        (["--lengths", "2k", "100"], "use longer ones"),
        (["--lengths", "4x"], "write as 0k"),
        (["--count", "0"], "at least 1"),
        (["--haystack", str(tmp_path / "none")], "cannot be read"),
        (["--haystack", str(tmp_path / "named.txt")], "give another text"),
        (["--tokenizer", str(hay)], "tokenizer.json"),
    ]:
        assert make(["--out", str(out), "--haystack", str(hay), "--task", "qa3", "--count", "5", *options]) == 2
        assert problem in capsys.readouterr().err
    assert not out.exists()
    for place, problem in ((hay, "Not a directory"), (Path("/proc/made"), "cannot be written")):
        assert make(["--out", str(place), "--haystack", str(hay), "--lengths", "2k", "--count", "1"]) == 2
        assert problem in capsys.readouterr().err
    assert hay.read_text() == HAYSTACK


def test_a_length_given_twice_is_made_once(tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text(HAYSTACK)
    options = _options(["--out", str(tmp_path), "--haystack", str(tmp_path / "hay.txt"), "--lengths", "0k", "0k"])
    assert make_files(options) == [tmp_path / "qa1" / "0k.jsonl"]
