"""Every source has its share at every place, found at once."""

import random
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest

from titans_train.mixing import Interleaved, Mixture, Phase, assign, units

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
        for number, source in enumerate(assign(shares, [Fraction(0)] * len(shares))[0], start=1):
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


def test_what_a_source_is_owed_counts_on_where_weights_change() -> None:
    rng, worst = random.Random(0), 0.0
    for _ in range(200):
        names = ["a", "b", "c", "d"][: rng.randrange(2, 5)]
        phases, first = [], 0
        for _ in range(rng.randrange(2, 12)):
            phases.append(
                (first, {name: rng.choice([0, 1, 1, 2, 5, 30]) for name in names} | {"a": rng.choice([1, 3])})
            )
            first += rng.randrange(1, 60)
        mixture, due = Mixture(names, phases), dict.fromkeys(names, 0.0)
        for number in range(first + 100):
            weights = next(weights for begin, weights in reversed(phases) if begin <= number)
            for name in names:
                due[name] += weights[name] / sum(weights.values())
            due[names[mixture.place(number)[0]]] -= 1
            worst = max(worst, *(abs(value) for value in due.values()))
    assert worst < 1.5  # 0.83 with constant weights; it does not grow with the number of changes


def test_a_small_source_is_not_starved_by_many_changes() -> None:
    weights = [{"a": 0.6, "b": 0.35, "c": 0.05}, {"a": 0.35, "b": 0.6, "c": 0.05}]
    mixture = Mixture(["a", "b", "c"], [(8 * n, weights[n % 2]) for n in range(100)])
    assert abs(mixture.counts(800)[2] - 40) <= 1


def test_the_past_does_not_depend_on_later_changes() -> None:
    first, later = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 0.1, "b": 0.1, "c": 0.8}
    one, other = Mixture(list(first), [(0, first)]), Mixture(list(first), [(0, first), (47, later)])
    assert [one.place(n) for n in range(47)] == [other.place(n) for n in range(47)]


def test_finite_sources_are_interleaved_each_sequence_once() -> None:
    mixed = Interleaved([3, 0, 7, 1])
    places = [mixed.place(number) for number in range(11)]
    assert sorted(places) == [(0, 0), (0, 1), (0, 2), *((2, n) for n in range(7)), (3, 0)]
    assert [place for source, place in places if source == 2] == list(range(7))


def test_weights_are_taken_as_written() -> None:
    assert units({"a": 0.1, "b": 0.2}) == {"a": 1, "b": 2}
    assert units({"a": 0.7, "b": 0.2, "c": 0.1}) == {"a": 7, "b": 2, "c": 1}
    assert units({"a": 1e-05, "b": 2.0}) == {"a": 1, "b": 200_000}
    assert units({"a": 70, "b": 30, "c": 0}) == {"a": 7, "b": 3, "c": 0}
    with pytest.raises(ValueError, match="no source has a weight above 0"):
        units({"a": 0.0})


def test_an_order_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"repeats after \d+ sequences, the limit is 100000"):
        Phase(["a", "b"], {"a": 0.1234567, "b": 0.9}, [Fraction(0)] * 2)


def test_it_imports_nothing_heavy() -> None:
    code = "import sys, titans_train.mixing; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
