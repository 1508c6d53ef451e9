"""Which source each sequence of a run comes from: exact shares, no randomness, no state.

Of the first n sequences, a source with the share w has w n to within 1 - 1 / (2 k - 2), k being the number of sources
with a weight: R. Tijdeman, The chairman assignment problem (1980). Where weights change, what each source is then owed
counts on, so that nothing drifts over any number of changes; only then may a count be off by a little more than one.
The past never depends on later weights. The order of constant weights repeats, so that any place is found at once.
Imports no torch.
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

Weights = tuple[tuple[int, Mapping[str, float]], ...]  # (steps before, weight of each source from there on)
LONGEST_PERIOD = 100_000  # sequences; weights with up to four digits stay below it


def phases_of(data: Data) -> Weights:
    """What a config says: the weights of all its sources, by the number of steps before those they are in force in."""
    assert data.sources is not None
    first = {name: source.weight for name, source in data.sources.items()}
    later = {int(step) - 1: weights for step, weights in (data.weights_from or {}).items()}
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


def assign(shares: Sequence[int], owed: Sequence[Fraction]) -> tuple[list[int], int]:
    """The source of each sequence under constant shares, and the place from which on the order repeats.

    owed: how many sequences each source is behind its share when these shares begin (below 0: ahead).

    A source may be next when it would not get ahead by more than the limit; of these, the one comes that would first
    fall behind by more than it. Everything is counted in whole parts of a sequence, so that nothing is rounded.
    """
    period, active = sum(shares), [source for source, share in enumerate(shares) if share]
    slack = max(2 * len(active) - 2, 1)
    whole = lcm(period * slack, *(part.denominator for part in owed))  # parts of one sequence
    rate = [share * (whole // period) for share in shares]
    limit, least = whole - whole // slack, whole // slack
    due, order = [int(part * whole) for part in owed], list[int]()
    begun: dict[tuple[int, ...], int] = {}
    while tuple(due) not in begun:
        begun[tuple(due)] = len(order)
        for _ in range(period):
            for source in active:
                due[source] += rate[source]
            ready = [source for source in active if due[source] >= least] or active
            chosen = min(ready, key=lambda source: ((limit - due[source]) // rate[source], source))
            due[chosen] -= whole
            order.append(chosen)
    return order, begun[tuple(due)]


class Phase:
    """Constant weights from a sequence on."""

    def __init__(self, names: Sequence[str], weights: Mapping[str, float], owed: Sequence[Fraction]) -> None:
        found = units(weights)
        self.shares = [found.get(name, 0) for name in names]
        self.period = sum(self.shares)
        if self.period > LONGEST_PERIOD:
            raise ValueError(f"the order repeats after {self.period} sequences, the limit is {LONGEST_PERIOD}")
        order, self.again = assign(self.shares, owed)
        self.order, self.owed = array("b" if len(names) < 128 else "i", order), list(owed)
        self.earlier = array("i")  # of the same source, before each place
        seen = [0] * len(names)
        for source in self.order:
            self.earlier.append(seen[source])
            seen[source] += 1
        self.repeats = [share * ((len(order) - self.again) // self.period) for share in self.shares]

    def _at(self, number: int) -> tuple[int, int]:
        """(place in the order, how often the repeating part was passed) of sequence `number`."""
        length = len(self.order) - self.again
        rounds, place = divmod(max(number - self.again, 0), length)
        return (self.again + place if number >= self.again else number), rounds

    def place(self, number: int) -> tuple[int, int]:
        """(source, how many of it came before) of sequence `number` since the phase began."""
        place, rounds = self._at(number)
        source = self.order[place]
        return source, rounds * self.repeats[source] + self.earlier[place]

    def counts(self, number: int) -> list[int]:
        """Of each source, among the first `number` sequences."""
        place, rounds = self._at(number)
        counts = [rounds * repeated for repeated in self.repeats]
        for source in self.order[:place]:
            counts[source] += 1
        return counts

    def owed_after(self, number: int) -> list[Fraction]:
        """How many sequences each source is behind its share after `number` sequences."""
        counts = self.counts(number)
        return [
            before + Fraction(share * number, self.period) - count
            for before, share, count in zip(self.owed, self.shares, counts, strict=True)
        ]


class Mixture:
    """Phases one after the other."""

    def __init__(self, names: Sequence[str], phases: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """`phases`: (first sequence, weights by name), in order, the first at 0."""
        assert phases[0][0] == 0 and all(a < b for (a, _), (b, _) in zip(phases, phases[1:], strict=False))
        self.names = list(names)
        self.firsts = [first for first, _ in phases]
        self.phases = [Phase(names, phases[0][1], [Fraction(0)] * len(names))]
        self.before = [[0] * len(names)]  # of each source, when each phase begins
        for (first, _), (last, weights) in zip(phases, phases[1:], strict=False):
            phase = self.phases[-1]
            self.before.append(_sum(self.before[-1], phase.counts(last - first)))
            self.phases.append(Phase(names, weights, phase.owed_after(last - first)))

    def place(self, number: int) -> tuple[int, int]:
        """(source, its how-manieth sequence, from 0) of sequence `number` of the run."""
        at = bisect_right(self.firsts, number) - 1
        source, earlier = self.phases[at].place(number - self.firsts[at])
        return source, self.before[at][source] + earlier

    def counts(self, number: int) -> list[int]:
        """Of each source, among the first `number` sequences of the run."""
        at = max(bisect_right(self.firsts, number) - 1, 0)
        return _sum(self.before[at], self.phases[at].counts(number - self.firsts[at]))


class Interleaved:
    """Every sequence of finite sources once, each source spread evenly over the whole."""

    def __init__(self, sizes: Sequence[int]) -> None:
        spread = ((place + 0.5) / size for size in sizes for place in range(size))
        places = [(source, place) for source, size in enumerate(sizes) for place in range(size)]
        self._places = [place for _, place in sorted(zip(spread, places, strict=True))]

    def place(self, number: int) -> tuple[int, int]:
        """(source, its how-manieth sequence, from 0) of sequence `number`."""
        return self._places[number]


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
