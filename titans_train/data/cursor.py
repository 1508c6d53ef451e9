"""Where a run stands in its data: how many sequences its steps have read, and of which data and weights.

Sequence n of a run is a function of (seed, data, weights, n); so all there is to keep is which n each step begins with.
The global batch size may change when a run goes on, so it is kept with the steps from which it was in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from titans_train.data.errors import DataError
from titans_train.mixing import Weights, units


@dataclass(frozen=True)
class Cursor:
    """`batch_sizes`: (first step, sequences per step from it on), in order, the first of step 0."""

    batch_sizes: tuple[tuple[int, int], ...]

    @classmethod
    def constant(cls, batch_size: int) -> Cursor:
        return cls(((0, batch_size),))

    def sequences(self, step: int) -> int:
        """Read before step `step`: the number of that step's first sequence."""
        ends = [first for first, _ in self.batch_sizes[1:]] + [step]
        return sum(
            max(min(end, step) - first, 0) * size for (first, size), end in zip(self.batch_sizes, ends, strict=True)
        )

    def batch(self, step: int) -> range:
        """Numbers of the sequences of global batch `step`, in order."""
        return range(self.sequences(step), self.sequences(step + 1))

    def going_on(self, step: int, batch_size: int) -> Cursor:
        """From step `step` on with this batch size; what was planned for later steps is forgotten."""
        kept = tuple((first, size) for first, size in self.batch_sizes if first < step)
        if kept and kept[-1][1] == batch_size:
            return Cursor(kept)
        return Cursor((*kept, (step, batch_size)))


def record(cursor: Cursor, weights: Weights, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint keeps, JSON-able."""
    return {
        "batch_sizes": [list(pair) for pair in cursor.batch_sizes],
        "weights": [[step, dict(by_source)] for step, by_source in weights],
        "fingerprints": dict(fingerprints),
    }


def read_cursor(found: Mapping[str, Any]) -> Cursor:
    return Cursor(tuple((int(step), int(size)) for step, size in found["batch_sizes"]))


def check_goes_on(
    found: Mapping[str, Any], weights: Weights, fingerprints: Mapping[str, str], step: int, where: str
) -> None:
    """DataError where a run at `step` would read on from other data, or from sources mixed otherwise, than it did."""
    then = tuple((int(first), by_source) for first, by_source in found["weights"])
    theirs, ours = _until(then, step), _until(weights, step)
    if theirs != ours:
        raise DataError(
            f"{where} has read its sources with the weights {_words(then)} up to step {step}, the config says "
            f"{_words(weights)}; weights may change from step {step + 1} on only: set the earlier ones back and give "
            "the new ones in data.weights_from"
        )
    for name in {name for _, shares in theirs for name in shares}:
        had, has = found["fingerprints"].get(name), fingerprints.get(name)
        if had != has:
            raise DataError(
                f"{where} was trained on other data of source {name!r} ({had}) than its path holds now ({has}); give "
                "the path of the same data, or choose another run.name"
            )


def _until(weights: Weights, step: int) -> list[tuple[int, dict[str, int]]]:
    """What was in force before `step`, in whole shares; changes that change nothing are left out."""
    phases: list[tuple[int, dict[str, int]]] = []
    for first, by_source in weights:
        shares = {name: share for name, share in sorted(units(by_source).items()) if share}
        if first < step or first == 0:
            phases.append((first, shares))
    return phases


def _words(weights: Weights) -> str:
    return ", ".join(f"{dict(by_source)} from step {step + 1}" for step, by_source in weights)
