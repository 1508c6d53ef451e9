"""Accuracy over lengths and depths: where in how long a text something is still found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from titans_train.data import Sample
from titans_train.evaluation.intervals import wilson
from titans_train.evaluation.scoring import Scorer, case_sums

Row = dict[str, Any]  # length, depth, cases, right, accuracy, low, high
Cells = dict[tuple[str, str], float | None]  # accuracy by the names of row and column; None: not measured


class Findable(Protocol):
    def sample(self, length: int, depths: Sequence[float], numbers: Sequence[int]) -> Sample:
        """Texts of `length` tokens, number n with what is to be found at depth depths[n % len(depths)]."""

    def check(self, length: int, count: int) -> None:
        """UserError where `length` tokens are too few for one of the texts 0 to count - 1."""


def depths_of(count: int) -> list[float]:
    """So many depths from 0 to 1, equally far apart; a single one: the middle."""
    return [0.5] if count == 1 else [n / (count - 1) for n in range(count)]


def grid(
    scorer: Scorer, task: Findable, lengths: Sequence[int], depths: Sequence[float], cases: int,
    tell: Callable[[list[Row]], object] = lambda rows: None,
) -> list[Row]:  # fmt: skip
    """`cases` texts for each length and depth; a length given twice counts once. A case is right if all its labels are.
    On every rank alike.

    low, high: 95 % Wilson interval. tell: called with each length's rows.
    """
    rows: list[Row] = []
    for length in dict.fromkeys(lengths):

        def sample(numbers: Sequence[int], length: int = length) -> Sample:
            return task.sample(length, depths, numbers)

        sums = case_sums(scorer, cases * len(depths), sample)
        right = (sums[:, 0] == sums[:, 1]).view(cases, len(depths)).sum(0).tolist()
        new = [row(length, depth, n, cases) for depth, n in zip(depths, right, strict=True)]
        tell(new)
        rows += new
    return rows


def row(length: int, depth: float, right: int, cases: int) -> Row:
    low, high = wilson(right, cases)
    return {
        "length": length, "depth": depth, "cases": cases, "right": right, "accuracy": right / cases,
        "low": low, "high": high,
    }  # fmt: skip


def over_depths(rows: Sequence[Row]) -> list[Row]:
    """One row per length, all depths together."""
    found = []
    for length in dict.fromkeys(r["length"] for r in rows):
        here = [r for r in rows if r["length"] == length]
        right, cases = sum(r["right"] for r in here), sum(r["cases"] for r in here)
        found.append({name: value for name, value in row(length, 0.0, right, cases).items() if name != "depth"})
    return found


def line(r: Row, name: str = "") -> str:
    interval = f"{r['low']:.1%} to {r['high']:.1%} of {r['cases']}"
    return f"  {name}{r['length']:>9,} tokens  {r['accuracy']:7.1%}  ({interval})"


def heat_map(tables: dict[str, Cells], path: Path, title: str, down: str, across: str) -> None:
    """A panel for each table: the first part of a cell's name down, the second across, as `down` and `across` say."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [[list(dict.fromkeys(name[part] for name in cells)) for part in (0, 1)] for cells in tables.values()]
    size = [1.8 + 0.45 * max(len(downs) for downs, _ in panels), 1.5 + sum(2 + 0.6 * len(xs) for _, xs in panels)]
    figure, all_axes = pyplot.subplots(1, len(tables), figsize=size[::-1], squeeze=False, layout="constrained")
    for axes, (name, cells), (downs, acrosses) in zip(all_axes[0], tables.items(), panels, strict=True):
        values = [[cells.get((y, x)) for x in acrosses] for y in downs]
        shown = [[math.nan if value is None else value for value in row_] for row_ in values]
        image = axes.imshow(shown, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(acrosses)), acrosses, rotation=45)
        axes.set_yticks(range(len(downs)), downs)
        axes.set(xlabel=across, ylabel=down, title=name)
        for y, row_ in enumerate(values):
            for x, value in enumerate(row_):
                axes.text(x, y, "" if value is None else f"{value:.0%}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, ax=all_axes[0].tolist(), label="accuracy")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
