"""Which source each sequence of a run comes from: exact shares, no randomness, no state.

Among any n sequences since the weights last changed, a source with share w has w n of them to within
1 - 1 / (2 k - 2), k being the number of sources with a weight: R. Tijdeman, The chairman assignment problem (1980).
The order repeats after `period` sequences, so that any place of a run is found at once. Imports no torch.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from titans_train.config.schema import Data

Weights = tuple[tuple[int, Mapping[str, float]], ...]  # (from step, weight of each source)
LONGEST_PERIOD = 100_000  # sequences; weights with up to four digits stay below it


def phases_of(data: Data) -> Weights:
    """What a config says: the weights of all its sources, from each step at which they change on."""
    assert data.sources is not None
    first = {name: source.weight for name, source in data.sources.items()}
    later = {int(step): weights for step, weights in (data.weights_from or {}).items()}
    return tuple(sorted({0: first, **later}.items()))


def units(weights: Mapping[str, float]) -> dict[str, int]:
    """The same shares as whole numbers without a common divisor; their sum is the period. Weights as written: 0.1 is
    1/10. ValueError: none is above 0."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    if not any(exact.values()):
        raise ValueError("no source has a weight above 0")
    scale = lcm(*(weight.denominator for weight in exact.values()))
    whole = {name: int(weight * scale) for name, weight in exact.items()}
    common = gcd(*whole.values())
    return {name: count // common for name, count in whole.items()}


def assign(shares: Sequence[int]) -> array[int]:
    """The source of each sequence of one period, for shares in units.

    A source may be next when it would not get ahead by more than the limit; of these, the one comes that would first
    fall behind by more than it. Everything is counted in units of 1 / (period * slack), so that nothing is rounded.
    """
    period, active = sum(shares), [source for source, share in enumerate(shares) if share]
    slack = max(2 * len(active) - 2, 1)
    limit = period * (slack - 1)
    due, order = dict.fromkeys(active, 0), array("i")  # due: what a source should have had less what it has had
    for _ in range(period):
        for source in active:
            due[source] += shares[source] * slack
        ready = [source for source in active if due[source] >= period]
        chosen = min(ready, key=lambda source: ((limit - due[source]) // (shares[source] * slack), source))
        due[chosen] -= period * slack
        order.append(chosen)
    return order


class Phase:
    """Constant weights from a sequence on."""

    def __init__(self, names: Sequence[str], weights: Mapping[str, float]) -> None:
        found = units(weights)
        self.shares = [found.get(name, 0) for name in names]
        self.period = sum(self.shares)
        if self.period > LONGEST_PERIOD:
            raise ValueError(f"the order repeats after {self.period} sequences, the limit is {LONGEST_PERIOD}")
        self.order = assign(self.shares)
        self.earlier = array("i")  # of the same source, within the period
        seen = [0] * len(names)
        for source in self.order:
            self.earlier.append(seen[source])
            seen[source] += 1

    def place(self, number: int) -> tuple[int, int]:
        """(source, how many of it came before) of sequence `number` since the phase began."""
        periods, place = divmod(number, self.period)
        source = self.order[place]
        return source, periods * self.shares[source] + self.earlier[place]

    def counts(self, number: int) -> list[int]:
        """Of each source, among the first `number` sequences."""
        periods, rest = divmod(number, self.period)
        counts = [periods * share for share in self.shares]
        for source in self.order[:rest]:
            counts[source] += 1
        return counts


class Mixture:
    """Phases one after the other. Each counts afresh, so that the past never depends on later changes."""

    def __init__(self, names: Sequence[str], phases: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """`phases`: (first sequence, weights by name), in order, the first at 0."""
        assert phases[0][0] == 0 and all(a < b for (a, _), (b, _) in zip(phases, phases[1:], strict=False))
        self.names = list(names)
        self.firsts = [first for first, _ in phases]
        self.phases = [Phase(names, weights) for _, weights in phases]
        self.before = [[0] * len(names)]  # of each source, when each phase begins
        for phase, first, last in zip(self.phases, self.firsts, self.firsts[1:], strict=False):
            self.before.append(_sum(self.before[-1], phase.counts(last - first)))

    def place(self, number: int) -> tuple[int, int]:
        """(source, its how-manieth sequence, from 0) of sequence `number` of the run."""
        at = bisect_right(self.firsts, number) - 1
        source, earlier = self.phases[at].place(number - self.firsts[at])
        return source, self.before[at][source] + earlier

    def counts(self, number: int) -> list[int]:
        """Of each source, among the first `number` sequences of the run."""
        at = max(bisect_right(self.firsts, number) - 1, 0)
        return _sum(self.before[at], self.phases[at].counts(number - self.firsts[at]))


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
