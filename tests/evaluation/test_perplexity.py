"""evaluate: its figures are those of a plain computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.data.corpus import prepare_folder, run_config
from tests.models.shapes import tiny
from titans_train.config.schema import Recall
from titans_train.data import open_dataset
from titans_train.evaluation.perplexity import evaluate
from titans_train.evaluation.scoring import Scorer
from titans_train.models import LanguageModel
from titans_train.parallel import process_group


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
    assert dataset.bytes_per_token is not None
    by_position = figures["by_position"]
    assert [(r["first"], r["last"]) for r in by_position] == [(0, 15), (16, 31), (32, 63), (64, 127)]
    assert sum(r["tokens"] for r in by_position) == count
    assert sum(r["tokens"] * r["loss"] for r in by_position) == pytest.approx(total, rel=1e-5)
    bits = total / count / math.log(2) / dataset.bytes_per_token
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_recall_reports_accuracy_at_the_asked_positions_only(tmp_path: Path) -> None:
    config = run_config(None, tmp_path, recall=Recall(pairs=4, keys=8, values=8, gap=4), length=20, vocabulary=29)
    dataset = open_dataset(config, "validation")
    with process_group() as mesh:
        figures = evaluate(Scorer(LanguageModel(tiny("lmm")), mesh, batch=8), dataset, 10)
    assert figures["tokens"] == 40 and 0 <= figures["accuracy"] <= 0.6 and "bits_per_byte" not in figures
