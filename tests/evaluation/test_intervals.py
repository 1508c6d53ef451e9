"""wilson: values from the literature, and what every interval must do."""

from __future__ import annotations

import pytest

from titans_train.evaluation.intervals import wilson


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
