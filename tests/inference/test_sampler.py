"""What each sampling option keeps, against its definition."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.inference import Sampler

LOGITS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()


def drawn(sampler: Sampler, logits: Tensor = LOGITS, seen: Tensor | None = None, times: int = 400) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(sampler.draw(logits, generator, seen) for _ in range(times))


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    assert drawn(Sampler(1.0)).keys() == {0, 1, 2, 3, 4}
    assert drawn(Sampler(1.0, top_k=3)).keys() == {0, 1, 2}
    assert drawn(Sampler(1.0, top_k=99)).keys() == {0, 1, 2, 3, 4}
    assert drawn(Sampler(1.0, 0.71)).keys() == {0, 1, 2}  # 0.4 + 0.3 does not reach it
    assert drawn(Sampler(1.0, 0.69)).keys() == {0, 1}
    assert drawn(Sampler(1.0, min_p=0.3)).keys() == {0, 1, 2}  # 0.3 x 0.4 = 0.12
    assert drawn(Sampler(1.0, min_p=1.0)).keys() == {0}


def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    # 0.4 / 0.7 = 0.57 of the two that are left
    assert drawn(Sampler(1.0, 0.5, top_k=2)).keys() == {0}
    assert drawn(Sampler(1.0, 0.5)).keys() == {0, 1}


def test_a_temperature_changes_the_shares_as_it_should() -> None:
    for temperature in (0.5, 1.0, 2.0):
        counts, expected = drawn(Sampler(temperature), times=4000), (LOGITS / temperature).softmax(-1)
        for token in range(5):
            assert counts[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)
    for temperature in (0.0, 1e-30, 1e-45):
        assert drawn(Sampler(temperature), times=20).keys() == {0}


def test_the_repetition_penalty_divides_positive_logits_and_multiplies_negative_ones() -> None:
    logits = torch.tensor([2.0, 1.5, -1.0, -1.5])
    seen = torch.tensor([True, False, True, False])
    assert Sampler(0, repetition_penalty=1.2).draw(logits, torch.Generator(), seen) == 0
    assert Sampler(0, repetition_penalty=1.4).draw(logits, torch.Generator(), seen) == 1
    only = logits.clone()
    only[:2] = -1e9
    assert Sampler(0, repetition_penalty=1.6).draw(only, torch.Generator(), seen) == 3
    counts = drawn(Sampler(1.0, repetition_penalty=1.4), logits, seen, 4000)
    expected = torch.tensor([2 / 1.4, 1.5, -1.4, -1.5]).softmax(-1)
    for token in range(4):
        assert counts[token] / 4000 == pytest.approx(float(expected[token]), abs=0.03)


def test_rows_are_drawn_as_each_is_alone() -> None:
    torch.manual_seed(0)
    logits, seen = torch.randn(6, 50) * 3, torch.rand(6, 50) < 0.3
    for sampler in (Sampler(0.7, 0.9, 45, 20, 0.02, 1.3), Sampler(0), Sampler(1.0)):
        rows = sampler.draw_rows(logits, [torch.Generator().manual_seed(row) for row in range(6)], seen)
        alone = [sampler.draw(logits[row], torch.Generator().manual_seed(row), seen[row]) for row in range(6)]
        assert rows == alone and max(rows) < (sampler.vocabulary or 50)


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -1.0), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.1),
     ("top_k", 0), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.nan)],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(option: str, value: float) -> None:
    with pytest.raises(UserError, match=option.replace("_", "-")):
        Sampler(**{option: value})
