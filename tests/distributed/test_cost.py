"""What a layout costs is what the plan says: collectives per layer, and peak memory in tensors."""

from __future__ import annotations

from typing import Any

import pytest

from titans_train.benchmark.layouts import LAYOUTS, run, unplanned

MEMORY_TOLERANCE = 0.1


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return run([layout for layout in LAYOUTS if layout.ranks == 2])


@pytest.mark.parametrize("index", range(len([layout for layout in LAYOUTS if layout.ranks == 2])))
def test_messages_and_peak_memory_are_those_of_the_plan(rows: list[dict[str, Any]], index: int) -> None:
    row = rows[index]
    assert not unplanned(row), row
    assert row["plan"] == pytest.approx(row["peak"], rel=MEMORY_TOLERANCE), row


def counts(rows: list[dict[str, Any]], block: str, shared: bool) -> dict[str, dict[str, int]]:
    row = next(r for r in rows if r["block"] == block and r["sequence_parallel"] is shared and r["tensor"] == 2)
    return {part: row["messages"][part]["counted"]["count"] for part in ("forward", "backward")}


@pytest.mark.parametrize(("block", "regions"), [("transformer", 2), ("lmm", 2), ("mag", 2), ("mal", 3)])
def test_a_region_costs_one_gather_and_one_reduction(rows: list[dict[str, Any]], block: str, regions: int) -> None:
    """Persistent tokens add small all-reduces of their own: one into each mixer, in MAL one out of the first."""
    plain, shared = counts(rows, block, False), counts(rows, block, True)
    fixed = {"transformer": (0, 0), "mal": (1, 2)}.get(block, (0, 1))
    assert plain == {
        "forward": {"all_reduce": regions + fixed[0]},
        "backward": {"all_reduce": regions + fixed[1]},
    }
    own = {"all_reduce": 1} if block == "mal" else {}
    assert shared["forward"] == {"all_gather": regions, "reduce_scatter": regions, **own}
    assert shared["backward"] == {"all_gather": 2 * regions, "reduce_scatter": regions, **own}


def test_mac_adds_one_gather_and_one_reduction_per_segment(rows: list[dict[str, Any]]) -> None:
    segments = 4
    shared = counts(rows, "mac", True)
    assert shared["forward"] == {"all_gather": 2 + segments, "reduce_scatter": 2, "all_reduce": segments}
    assert shared["backward"] == {"all_gather": 4, "reduce_scatter": 2 + segments, "all_reduce": segments}


@pytest.mark.long
def test_layouts_on_four_ranks_cost_what_the_plan_says() -> None:
    for row in run([layout for layout in LAYOUTS if layout.ranks == 4]):
        assert not unplanned(row), row
        assert row["plan"] == pytest.approx(row["peak"], rel=MEMORY_TOLERANCE), row
