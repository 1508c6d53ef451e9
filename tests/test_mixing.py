"""Every source has its share at every place, found at once."""

import random
import subprocess
import sys
from collections import Counter

import pytest

from titans_train.mixing import Mixture, Phase, assign, units

WEIGHTS = [
    {"a": 1.0},
    {"a": 0.7, "b": 0.2, "c": 0.1},
    {"a": 0.5, "b": 0.5},
    {"a": 1.0, "b": 0.0, "c": 2.0},
    {"a": 0.9999, "b": 0.0001},
    {"a": 0.01, "b": 0.3, "c": 0.3, "d": 0.39},
    {"a": 3.0, "b": 5.0, "c": 7.0, "d": 11.0, "e": 13.0, "f": 2.5},
]


def bound(count: int) -> float:
    return 1 - 1 / (2 * count - 2) if count > 1 else 0.0


@pytest.mark.parametrize("weights", WEIGHTS)
def test_counts_are_within_one_of_the_weights_at_any_place(weights: dict[str, float]) -> None:
    names, total = list(weights), sum(weights.values())
    mixture, seen = Mixture(names, [(0, weights)]), Counter[int]()
    limit = bound(sum(1 for weight in weights.values() if weight))
    for number in range(25_000):
        assert mixture.place(number)[1] == seen[mixture.place(number)[0]]
        seen[mixture.place(number)[0]] += 1
        for source, name in enumerate(names):
            assert abs(seen[source] - weights[name] / total * (number + 1)) <= limit + 1e-6


def test_random_shares_keep_the_bound_of_the_theorem() -> None:
    rng = random.Random(0)
    for _ in range(300):
        shares = [rng.choice([0, 1, 2, 7, 50, rng.randrange(1, 200)]) for _ in range(rng.randrange(2, 9))] + [3]
        seen, period, limit = [0] * len(shares), sum(shares), bound(sum(1 for share in shares if share))
        for number, source in enumerate(assign(shares), start=1):
            seen[source] += 1
            assert max(abs(s - share * number / period) for s, share in zip(seen, shares, strict=True)) <= limit + 1e-9
        assert seen == shares


def test_any_place_is_found_without_those_before_it() -> None:
    weights = [
        (0, {"a": 0.6, "b": 0.4, "c": 0.0}),
        (37, {"a": 0.0, "b": 0.35, "c": 0.65}),
        (101, {"a": 1, "b": 1, "c": 1}),
    ]
    mixture, seen = Mixture(["a", "b", "c"], weights), [0, 0, 0]
    for number in range(500):
        assert mixture.counts(number) == seen
        source, earlier = mixture.place(number)
        assert earlier == seen[source]
        seen[source] += 1
    far = 10**12 + 7
    source, earlier = mixture.place(far)
    assert mixture.counts(far)[source] == earlier
    assert sum(mixture.counts(far)) == far


def test_each_phase_keeps_its_weights_from_where_it_begins() -> None:
    mixture = Mixture(["a", "b"], [(0, {"a": 0.9, "b": 0.1}), (33, {"a": 0.2, "b": 0.8})])
    for number in range(33, 300):
        new = mixture.counts(number)[0] - mixture.counts(33)[0]
        assert abs(new - 0.2 * (number - 33)) <= 0.5
    assert [mixture.place(n) for n in range(33)] == [
        Mixture(["a", "b"], [(0, {"a": 0.9, "b": 0.1})]).place(n) for n in range(33)
    ]


def test_weights_are_taken_as_written() -> None:
    assert units({"a": 0.1, "b": 0.2}) == {"a": 1, "b": 2}
    assert units({"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert units({"a": 1e-05, "b": 2.0}) == {"a": 1, "b": 200_000}
    assert units({"a": 70, "b": 30, "c": 0}) == {"a": 7, "b": 3, "c": 0}
    with pytest.raises(ValueError, match="no source has a weight above 0"):
        units({"a": 0.0})


def test_an_order_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repeats after \d+ sequences, the limit is 100000"):
        Phase(["a", "b"], {"a": 0.1234567, "b": 0.9})


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, titans_train.mixing; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
