"""Training on real gloo processes equals one process: every block, layout and ZeRO stage (`--all`: all of them)."""

from __future__ import annotations

from typing import Any

import pytest

from titans_train.benchmark.parity import LAYOUTS, SHARDED, Layout, failures, run
from titans_train.shape import BLOCKS, PEERS

# Three AdamW steps of 1e-3: where a gradient is near zero, rounding that is divided by its own size moves a parameter.
PARAMETER_LIMIT = 1e-4
LATER_LIMIT = 5e-4  # of gradients taken at parameters that are so far apart


def check(rows: list[dict[str, Any]]) -> None:
    assert not failures(rows)
    for row in rows:
        assert row.get("norm", 0) <= (1e-5 if row["kind"] == "float32" else 0.1), row
        if row["kind"] == "float32":
            assert row["parameter"] <= PARAMETER_LIMIT and row["later"] <= LATER_LIMIT, row


def test_zero_on_one_and_two_ranks() -> None:
    rows = run(list(BLOCKS), [Layout(), Layout(data=2)], [0, 1, 2, 3])
    assert len(rows) == len(BLOCKS) * 2 * 4
    check(rows)


def test_tensor_and_sequence_parallelism_on_two_ranks() -> None:
    """With one process in bf16 as measure of bf16."""
    kinds = ["float32", "bfloat16", "float64"]
    rows = run(list(BLOCKS), [Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)], [1], kinds)
    assert len(rows) == len(BLOCKS) * (2 + 3 + 3)
    check(rows)


def test_sequence_shards_on_two_ranks() -> None:
    rows = run(list(BLOCKS), [Layout(), Layout(sequence=2)], [1, 2, 3], ["float32", "bfloat16", "float64"])
    assert len(rows) == len(BLOCKS) * (3 + 3 + 3 + 3 + 1)
    check(rows)


def test_other_papers_rules_on_two_ranks() -> None:
    layouts = [Layout(), Layout(tensor=2, sequence_parallel=True), Layout(sequence=2)]
    check(run([f"lmm-{rule}" for rule in PEERS], layouts[1:], [1], ["float32", "float64"]))
    check(run(["mag-gated_deltanet", "mal-rwkv7"], layouts, [1, 3]))
    assert not failures(run(["mag-gated_deltanet"], layouts, [1], ["bfloat16"]))


def test_sequence_shards_beside_tensor_and_data_parallelism_on_four_ranks() -> None:
    """With both micro-batches of a step in one wave where the layout says so."""
    layouts = [layout for layout in SHARDED if layout.ranks == 4]
    check(run(["mac"], layouts, [3], ["float32", "float64"]) + run(["mag"], layouts, [1], ["float32", "float64"]))


def test_tensor_times_data_parallelism_on_four_ranks() -> None:
    check(run(["mac", "mal"], [Layout(tensor=2, data=2, sequence_parallel=True)], [2, 3]))
    check(run(["mag"], [Layout(tensor=4, sequence_parallel=True), Layout(tensor=2, data=2)], [1]))


@pytest.mark.long
def test_every_layout_and_stage() -> None:
    check(run(list(BLOCKS), LAYOUTS, [0, 1, 2, 3], ["float32", "bfloat16", "float64"]))
