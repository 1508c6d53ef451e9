"""How a plan crosses sequence shards: its predictions are those of the simulated schedule, its choices follow them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.config.samples import load
from tests.models.shapes import tiny
from titans_train.benchmark.schedule import Job, Times, simulate
from titans_train.plan import make_plan
from titans_train.plan_sequence import (
    ENOUGH,
    MULTIPROCESSORS,
    SequencePlan,
    Work,
    affine_flops,
    efficiency,
    plan_sequence,
    work,
)
from titans_train.shape import ModelShape

LINEAR = {"depth": 1, "residual_norm": False, "forget_to": "zero"}


def big(block: str = "lmm", **memory: Any) -> ModelShape:
    shape = tiny(block, memory={"chunk_size": 64, "hidden": 256, **memory} if block != "transformer" else None)
    return replace(shape, layers=24, width=1024, heads=16, head_dim=64, feed_forward=2752)


def planned(shape: ModelShape, **changes: Any) -> SequencePlan:
    options: dict[str, Any] = {
        "shards": 8, "length": 65536, "sequences": 1, "tensor": 1, "micro_batches": 4, "stage": 1, "strategy": None,
        "pieces": None, "wave": None,
    }  # fmt: skip
    return plan_sequence(shape, **(options | changes))


@pytest.mark.parametrize(("pieces", "wave"), [(1, 1), (4, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("barrier", [False, True])
def test_the_prediction_is_the_simulated_schedule(pieces: int, wave: int, barrier: bool) -> None:
    w = Work(layer=10.0, slowest=10.0, chain=4.0, again=4.0, affine=0.0, head=0.0)
    forward = Times(before=3.0, piece=4.0 / pieces, after=3.0)
    backward = Times(before=6.0, piece=12.0 / pieces, after=6.0)
    job = Job(24, 8, pieces, 4, wave, forward, backward, barrier)
    assert efficiency(w, 24, 8, 4, pieces, wave, blocked=barrier) == pytest.approx(simulate(job).efficiency, rel=1e-9)


def test_pieces_are_as_many_as_pay() -> None:
    """Each costs a scan PIECE_ROWS more rows; with more rows there can be more of them."""
    few, many = planned(big()), planned(big(), sequences=8)
    assert 1 < few.pieces < many.pieces and few.wave == many.wave == 1
    for plan, rows in ((few, 16), (many, 128)):
        w = work(big(), 65536, 8)
        other = [efficiency(w, 24, 8, 4, g, 1, rows=rows) for g in range(1, 17)]
        assert plan.efficiency == max(other) and plan.pieces == 1 + other.index(max(other))


@pytest.mark.parametrize(("sequences", "most"), [(1, 1), (8, 1), (16, 1), (17, 2), (66, 8)])
def test_pieces_of_triton_s_kernels_fill_a_gpu(sequences: int, most: int) -> None:
    """16 heads: 8 sequences are 128 rows, a little less than there are multiprocessors."""
    plan = planned(big(kernels="triton"), sequences=sequences)
    assert plan.pieces <= most and (plan.pieces > 1) == (most > 1)
    rows = 16 * sequences
    assert ("rows (batch x heads)" in plan.reason) == (rows < MULTIPROCESSORS)
    asked = planned(big(kernels="triton"), sequences=sequences, pieces=16, wave=1)
    if rows < MULTIPROCESSORS:  # a piece takes as long as all rows
        w = work(big(), 65536, 8)
        assert asked.efficiency < plan.efficiency <= efficiency(w, 24, 8, 4, 1, plan.wave)


def test_fewer_rows_than_multiprocessors_take_as_long_as_one() -> None:
    w = work(big(), 65536, 8)
    whole, halves = (efficiency(w, 24, 8, 4, g, 1, rows=264, programs=264) for g in (1, 2))
    assert halves == efficiency(w, 24, 8, 4, 2, 1) > whole  # nothing is lost
    ideal = 4 * (24 * w.both + 3 * w.head)
    time = ideal + w.waiting * (4 * 24 + 4 * 7)  # two pieces take twice as long: nobody waits less, all compute twice
    assert efficiency(w, 24, 8, 4, 2, 1, rows=16, programs=16) == pytest.approx(ideal / time)


def test_waves_grow_only_where_pieces_do_not_suffice() -> None:
    """MAC with one sequence has nothing to cut."""
    plan = planned(big("mac"), shards=16, micro_batches=8)
    assert plan.pieces == 1 and plan.wave in (2, 4, 8)
    alone = planned(big("mac"), shards=16, micro_batches=8, wave=1)
    assert alone.efficiency < min(ENOUGH, plan.efficiency)


def test_what_the_config_says_is_kept() -> None:
    plan = planned(big(**LINEAR), pieces=3, wave=2, strategy="wavefront")
    assert (plan.pieces, plan.wave, plan.strategy) == (3, 2, "wavefront")
    assert "asks for it" in plan.reason


def test_a_linear_memory_over_very_many_shards_uses_affine_maps() -> None:
    few, many = (planned(big(**LINEAR), shards=p, micro_batches=1) for p in (4, 1024))
    assert few.strategy == "wavefront" and many.strategy == "affine"
    assert "affine scan would" in few.reason and "wavefront would" in many.reason
    assert planned(big(), shards=1024, micro_batches=1).strategy == "wavefront"


def test_the_affine_scan_adds_the_work_of_its_two_functions() -> None:
    """tests/memory/test_affine.py counts the products of both."""
    assert affine_flops(big(**LINEAR)) == 16 * (18 * 64**2 + 10 * 64**2 + 4 * 64 * 64)
    assert affine_flops(big(**LINEAR, momentum=False)) == 16 * (8 * 64**2 + 6 * 64**2 + 4 * 64 * 64)
    assert affine_flops(big()) == 0


def test_zero_3_is_warned_of_with_its_predicted_cost() -> None:
    one, three = planned(big(), stage=1), planned(big(), stage=3)
    assert not one.warnings
    (text,) = three.warnings
    assert "ZeRO 3" in text and f"{three.efficiency:.1%}" in text and f"{one.efficiency:.1%}" in text
    assert three.efficiency < one.efficiency and three.wave == 1  # longer waves would not help


def test_zero_2_reduces_at_the_end_where_a_wavefront_would_stop(tmp_path: Path) -> None:
    whole, cut = (make_plan(load(tmp_path, f"parallel.sequence={p}", "parallel.zero_stage=2"), 2) for p in (1, 2))
    assert cut.zero.bucket == cut.parameter_count > whole.zero.bucket


def test_full_attention_over_shards_waits_for_the_last_one() -> None:
    shape = replace(big("transformer"), attention=replace(big("transformer").attention, window=None))
    short, long = planned(shape, length=8192), planned(shape, length=1048576)
    assert long.efficiency < short.efficiency < 1 and long.efficiency > 0.5
    windowed = replace(shape, attention=replace(shape.attention, window=512))
    assert planned(windowed).efficiency == 1 and planned(windowed).strategy == "window"


def test_the_plan_says_how_a_scan_crosses_shards(tmp_path: Path) -> None:
    config = load(tmp_path, "parallel.sequence=2", "parallel.pieces=2", "parallel.zero_stage=3")
    text = make_plan(config, 4).describe()
    for part in (
        "one sequence on ranks [0 1]: 32 tokens each", "wavefront in 2 pieces", "predicted efficiency",
        "warning: ZeRO 3", "to the next shard", "to the shard before", "the memory has no affine form",
    ):  # fmt: skip
        assert part in text, text
