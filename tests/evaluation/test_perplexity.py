"""evaluate: its figures are those of a plain computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from data_prep.__main__ import main as prepare
from data_prep.tokenizer import load_tokenizer
from tests.data.corpus import prepare_folder, run_config
from tests.data_prep.test_tokenizer import bpe_file, model_file
from tests.models.shapes import tiny
from tests.torchrun import torchrun
from titans_train.config.schema import Recall
from titans_train.data import TokenDataset, open_dataset
from titans_train.evaluation.perplexity import evaluate
from titans_train.evaluation.scoring import Scorer
from titans_train.models import LanguageModel
from titans_train.parallel import process_group
from titans_train.training.validation import validate


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_loss_perplexity_and_bits_per_byte(packing: str, tmp_path: Path) -> None:
    config = run_config(prepare_folder(tmp_path), tmp_path / "runs", packing=packing)
    shape = tiny("lmm", vocabulary=264)
    dataset = open_dataset(config, "validation", shape.document_alignment)
    torch.manual_seed(0)
    model = LanguageModel(shape)
    with process_group() as mesh:
        figures = evaluate(Scorer(model, mesh, batch=2), dataset, 5)
    total, count = 0.0, 0
    for n in range(5):
        s = dataset.sequence(n)
        starts = None if s.document_starts is None else s.document_starts[None]
        logits = model(s.tokens[None], document_starts=starts).logits[0]
        with torch.no_grad():
            total += float(torch.nn.functional.cross_entropy(logits, s.labels, reduction="sum", ignore_index=-100))
        count += int((s.labels != -100).sum())
    assert figures["tokens"] == count and figures["sequences"] == 5
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    by_position = figures["by_position"]
    assert [(r["first"], r["last"]) for r in by_position] == [(0, 15), (16, 31), (32, 63), (64, 127)]
    assert sum(r["tokens"] for r in by_position) == count
    assert sum(r["tokens"] * r["loss"] for r in by_position) == pytest.approx(total, rel=1e-5)
    size = sum(int(((s.labels >= 0) & (s.labels < 256)).sum()) for s in map(dataset.sequence, range(5)))
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert figures["bytes"] == size and "bytes_by_average" not in figures


def two_scripts(folder: Path, tokenizer: Path) -> Path:
    """Prepared texts of few and of many bytes a token."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(12):
        (texts / f"a{number:02}.txt").write_text(f"{number}: " + "def f(x): return x + 1 # word1 another2 " * 40)
        (texts / f"b{number:02}.txt").write_text(f"{number}漢字語文" * 20)
    options = ["--tokenizer", str(tokenizer), "--validation-share", "0.5"]
    assert prepare(["--input", str(texts), "--output", str(folder / "prepared"), *options]) == 0
    return folder / "prepared"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_bytes_are_those_of_the_text_that_is_scored(kind: str, tmp_path: Path) -> None:
    file = {"bpe": bpe_file, "sentencepiece": model_file}[kind](tmp_path)
    config = run_config(two_scripts(tmp_path, file), tmp_path / "runs", length=16, vocabulary=400)
    dataset, tokenizer = open_dataset(config, "validation"), load_tokenizer(str(file))
    assert isinstance(dataset, TokenDataset) and dataset.bytes_per_token is not None
    far = []
    for count in (4, 11, dataset.sequences_total):
        given = dataset.sequences(list(range(count)))
        documents = [[int(given.tokens[0, 0])]]
        for label in given.labels.flatten().tolist():
            documents += [[]] if label == tokenizer.end_of_document else []
            documents[-1].append(label)
        size = sum(len(tokenizer.decode(tokens).encode()) for tokens in documents)
        size -= len(tokenizer.decode(documents[0][:1]).encode())  # which is given
        with process_group() as mesh:
            scorer = Scorer(LanguageModel(tiny("lmm", vocabulary=400)), mesh, batch=8)
            figures = evaluate(scorer, dataset, count)
            in_training = validate(scorer.model, dataset, count, 8, mesh, lambda: None)
        assert abs(figures["bytes"] - size) <= 3  # half a character may end it
        bits = figures["loss"] * figures["tokens"] / math.log(2) / figures["bytes"]
        assert figures["bits_per_byte"] == in_training["validation_bits_per_byte"] == pytest.approx(bits, rel=1e-12)
        assert in_training["validation_bytes"] == figures["bytes"]
        far.append(figures["bytes"] / figures["tokens"] / dataset.bytes_per_token)
    assert max(map(abs, (far[0] - 1, far[1] - 1))) > 0.1 and far[2] == pytest.approx(1, abs=0.02)


def test_where_the_tokenizer_does_not_tell_bytes_are_the_average_of_the_split(tmp_path: Path) -> None:
    folder = two_scripts(tmp_path, model_file(tmp_path, byte_fallback=False, vocab_size=60))
    dataset = open_dataset(run_config(folder, tmp_path / "runs", length=16, vocabulary=400), "validation")
    with process_group() as mesh:
        figures = evaluate(Scorer(LanguageModel(tiny("lmm", vocabulary=400)), mesh, batch=8), dataset)
        (folder / "tokenizer.model").unlink()
        again = open_dataset(run_config(folder, tmp_path / "runs", length=16, vocabulary=400), "validation")
        unread = evaluate(Scorer(LanguageModel(tiny("lmm", vocabulary=400)), mesh, batch=8), again, 4)
    for found in (figures, unread):
        assert dataset.bytes_per_token is not None and "bytes" not in found
        assert found["bytes_by_average"] == pytest.approx(found["tokens"] * dataset.bytes_per_token)
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) / dataset.bytes_per_token)


def test_bytes_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    prepare_folder(tmp_path)
    done = torchrun(2, "tests/evaluation/perplexity_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr
    one, *others = json.loads((tmp_path / "found.json").read_text())
    assert len(others) == 3 and one["bytes"] > 0
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_recall_reports_accuracy_at_the_asked_positions_only(tmp_path: Path) -> None:
    config = run_config(None, tmp_path, recall=Recall(pairs=4, keys=8, values=8, gap=4), length=20, vocabulary=29)
    dataset = open_dataset(config, "validation")
    with process_group() as mesh:
        figures = evaluate(Scorer(LanguageModel(tiny("lmm")), mesh, batch=8), dataset, 10)
    assert figures["tokens"] == 40 and 0 <= figures["accuracy"] <= 0.6 and "bits_per_byte" not in figures
