"""Scores are those of a plain forward, however sequences are cut and on any layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.scoring_worker import BLOCKS, CASES, COUNT, LENGTH, sample, shape_of
from tests.torchrun import torchrun
from titans_train.data import Sample
from titans_train.evaluation import scoring
from titans_train.evaluation.scoring import Scorer, case_and_position_sums
from titans_train.models import LanguageModel
from titans_train.parallel import process_group


def model(block: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(shape_of(block)).double()


def plain(block: str) -> torch.Tensor:
    """labelled, right and losses by place: [COUNT, LENGTH, 3]"""
    given = sample(range(COUNT))
    with torch.no_grad():
        logits = model(block)(given.tokens).logits
    losses = F.cross_entropy(logits.transpose(1, 2), given.labels, reduction="none", ignore_index=-100)
    right = logits.argmax(-1) == given.labels
    return torch.stack([(given.labels != -100).double(), right.double(), losses], -1)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("piece", [4096, 16], ids=["whole", "pieces"])
def test_scores_are_those_of_a_plain_forward(block: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", piece)
    want = plain(block)
    with process_group() as mesh:
        scorer = Scorer(model(block), mesh, batch=2)
        cases, places = case_and_position_sums(scorer, COUNT, sample, LENGTH)
    assert torch.allclose(cases, want.sum(1), rtol=1e-10, atol=1e-10)
    assert torch.allclose(places, want.sum(0), rtol=1e-10, atol=1e-10)
    assert 0 < cases[:, 1].sum() < cases[:, 0].sum()


@pytest.mark.parametrize("block", ["lmm", "mac", "transformer"])
def test_documents_restart_within_pieces(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(numbers: Sequence[int]) -> Sample:
        given = sample(numbers)
        starts = torch.zeros(given.tokens.shape, dtype=torch.bool)
        starts[:, [0, 16]] = True
        return Sample(given.tokens, given.labels, starts)

    with process_group() as mesh:
        scorer = Scorer(model(block), mesh, batch=3)

        def places(given: Callable[[Sequence[int]], Sample]) -> torch.Tensor:
            return case_and_position_sums(scorer, COUNT, given, LENGTH)[1]

        whole = places(packed)
        monkeypatch.setattr(scoring, "PIECE", 8)
        assert torch.allclose(places(packed), whole, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(places(sample), whole)


def test_scores_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    torchrun(4, "tests/evaluation/scoring_worker.py", str(file))
    found = json.loads(file.read_text())
    assert len(found) == len(CASES)
    for case in found:
        want = plain(case["block"]).sum(1)
        got = torch.tensor(case["cases"], dtype=torch.float64)
        assert torch.equal(got[:, :2], want[:, :2]), case["layout"]
        assert torch.allclose(got[:, 2], want[:, 2], rtol=1e-6), case["layout"]
        places = torch.tensor(case["places"], dtype=torch.float64)
        assert torch.allclose(places[:, 2], plain(case["block"]).sum(0)[:, 2])
