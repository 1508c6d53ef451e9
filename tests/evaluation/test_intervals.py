"""wilson: values from the literature, and what every interval must do."""

from __future__ import annotations

import random

import pytest

from titans_train.evaluation.intervals import clustered, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (score, without continuity correction)
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_are_the_published_ones(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)
    a, b = wilson(count - right, count)
    assert (1 - b, 1 - a) == pytest.approx((low, high), abs=1e-4)


def test_an_interval_holds_the_share_and_stays_within_0_and_1() -> None:
    for count in (1, 2, 10, 1000):
        for right in {0, 1, count // 2, count}:
            low, high = wilson(right, count)
            assert 0 <= low <= right / count <= high <= 1 and low < high
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1


@pytest.mark.parametrize(("right", "count"), [(0, 0), (2, 1), (-1, 3)])
def test_what_is_no_share_is_refused(right: int, count: int) -> None:
    with pytest.raises(ValueError, match="no share"):
        wilson(right, count)


def test_answers_of_one_sequence_count_as_those_that_they_are_worth() -> None:
    assert clustered([1, 0, 1, 1], [1, 1, 1, 1]) == pytest.approx(wilson(3, 4), abs=0.05)
    assert clustered([0, 0], [8, 8]) == wilson(0, 16) and clustered([8, 8], [8, 8]) == wilson(16, 16)
    # all of a sequence right, or none: as many answers as sequences, less one
    assert clustered([8] * 30 + [0] * 20, [8] * 50) == pytest.approx(wilson(0.6 * 49, 49), abs=1e-9)


@pytest.mark.parametrize("mean", [0.3, 0.9])
def test_the_interval_holds_the_true_share_in_95_of_100_experiments(mean: float) -> None:
    draw, held, held_alone = random.Random(0), 0, 0
    for _ in range(400):
        shares = [draw.betavariate(2 * mean, 2 * (1 - mean)) for _ in range(60)]  # of each sequence
        right = [sum(draw.random() < share for _ in range(16)) for share in shares]
        low, high = clustered(right, [16] * 60)
        held += low <= mean <= high
        low, high = wilson(sum(right), 16 * 60)
        held_alone += low <= mean <= high
    assert 0.92 <= held / 400 <= 0.98 and held_alone / 400 < 0.8
