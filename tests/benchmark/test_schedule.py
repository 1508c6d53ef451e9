"""The simulated wavefront keeps its own rules, reaches what the closed forms say, and is drawn."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from titans_train.benchmark.schedule import Job, Times, draw, predicted_time, simulate


def job(pieces: int, micro_batches: int = 1, wave: int = 1, scan: float = 1.0, **changes: object) -> Job:
    """24 layers of 32 ms forward and 64 ms backward on 8 shards; `scan` is the scan's share of a layer."""

    def times(layer: float) -> Times:
        return Times((1 - scan) / 2 * layer, scan * layer / pieces, (1 - scan) / 2 * layer)

    usual = Job(24, 8, pieces, micro_batches, wave, times(0.032), times(0.064))
    return replace(usual, **changes)  # type: ignore[arg-type]


def any_job(seed: int) -> Job:
    numbers = random.Random(seed)

    def seconds() -> float:
        return numbers.choice([0.0, numbers.random(), 5 * numbers.random()])

    def times(recompute: float) -> Times:
        piece = 0.01 + numbers.random()
        return Times(seconds(), piece, seconds(), seconds(), recompute * piece)

    layers, shards, pieces, micro_batches, wave = (numbers.randint(1, 5) for _ in range(5))
    backward = times(numbers.choice([0.0, 0.3, 0.99]))
    return Job(layers, shards, pieces, micro_batches, wave, times(0.0), backward, numbers.random() < 0.3)


@pytest.mark.parametrize("pieces", [1, 2, 3, 8])
@pytest.mark.parametrize("shards", [1, 2, 8])
@pytest.mark.parametrize("wave", [1, 4])
def test_layers_that_are_all_scan_reach_the_closed_form(pieces: int, shards: int, wave: int) -> None:
    schedule = simulate(job(pieces, micro_batches=4, wave=wave, layers=6, shards=shards))
    full = 6 * pieces * wave
    assert schedule.efficiency == pytest.approx(full / (full + shards - 1), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("case", "percent"),
    [
        (job(1), 77.4),
        (job(4), 93.2),
        (job(8), 96.5),
        (job(1, micro_batches=4, wave=4), 93.2),
        (job(4, micro_batches=4, wave=4), 98.2),
        (job(1, micro_batches=4), 77.4),
        (job(1, micro_batches=6, wave=3), 91.1),
        (job(1, scan=0.4), 89.6),
        (job(4, scan=0.4), 97.2),
        (job(1, barrier=True), 12.5),
        (job(4, barrier=True), 36.4),
        (job(8, barrier=True), 53.3),
    ],
)
def test_efficiencies_worked_out_by_hand(case: Job, percent: float) -> None:
    assert round(100 * simulate(case).efficiency, 1) == percent


@pytest.mark.parametrize("seed", range(100))
def test_the_predicted_time_is_the_simulated_one(seed: int) -> None:
    case = any_job(seed)
    schedule = simulate(case)
    assert predicted_time(case) == pytest.approx(schedule.makespan, rel=1e-12)
    assert schedule.idle == pytest.approx([schedule.makespan - case.work] * case.shards, abs=1e-9)


def test_a_schedule_small_enough_to_check_by_eye() -> None:
    case = Job(1, 2, 2, 1, 1, Times(1, 2, 3, latency=0.5), Times(1, 4, 2, latency=0.5, recompute=1))
    rows = [
        [(e.start, e.stop, e.kind[0], e.part, e.piece) for e in simulate(case).events if e.rank == r] for r in (0, 1)
    ]
    assert rows[0][:4] == [
        (0, 1, "f", "before", None),
        (1, 3, "f", "scan", 0),
        (3, 5, "f", "scan", 1),
        (5, 8, "f", "after", None),
    ]
    # Rank 1 waits for piece 0 of rank 0, done at 3, and its message; piece 1 is then there in time.
    assert rows[1][:4] == [
        (0, 1, "f", "before", None),
        (3.5, 5.5, "f", "scan", 0),
        (5.5, 7.5, "f", "scan", 1),
        (7.5, 10.5, "f", "after", None),
    ]
    assert rows[1][4:] == [
        (10.5, 12.5, "b", "after", None),
        (12.5, 13.5, "b", "scan", 1),
        (13.5, 16.5, "b", "scan", 1),
        (16.5, 17.5, "b", "scan", 0),
        (17.5, 20.5, "b", "scan", 0),
        (20.5, 21.5, "b", "before", None),
    ]
    # Rank 0 recomputes piece 1, waits for rank 1's, done at 16.5, and then has piece 0's in time.
    assert rows[0][4:] == [
        (8, 10, "b", "after", None),
        (10, 11, "b", "scan", 1),
        (17, 20, "b", "scan", 1),
        (20, 21, "b", "scan", 0),
        (21, 24, "b", "scan", 0),
        (24, 25, "b", "before", None),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_rank_does_one_thing_at_a_time_and_all_of_its_work(seed: int) -> None:
    case = any_job(seed)
    for rank in range(case.shards):
        events = [e for e in simulate(case).events if e.rank == rank]
        assert all(a.stop <= b.start for a, b in pairwise(events))
        assert sum(e.stop - e.start for e in events) == pytest.approx(case.work)


@pytest.mark.parametrize("seed", range(20))
def test_no_piece_starts_before_its_state_has_arrived(seed: int) -> None:
    case = any_job(seed)
    # The later event of a piece that is recomputed first: it is the one that needs the state gradient.
    pieces = {(e.kind, e.rank, e.micro_batch, e.layer, e.piece): e for e in simulate(case).events if e.part == "scan"}
    assert len(pieces) == 2 * case.shards * case.micro_batches * case.layers * case.pieces
    for (kind, rank, micro_batch, layer, piece), event in pieces.items():
        from_rank = rank - 1 if kind == "forward" else rank + 1
        neighbour = pieces.get((kind, from_rank, micro_batch, layer, piece))
        latency = case.forward.latency if kind == "forward" else case.backward.latency
        assert neighbour is None or event.start >= neighbour.stop + latency


@pytest.mark.parametrize("seed", range(20))
def test_a_barrier_lets_no_rank_start_a_layer_before_all_have_ended_the_last(seed: int) -> None:
    case = replace(any_job(seed), barrier=True)
    layers: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for e in simulate(case).events:
        layers.setdefault((e.kind, e.micro_batch, e.layer), []).append((e.start, e.stop))
    for earlier, later in pairwise(layers.values()):
        assert max(stop for _, stop in earlier) <= min(start for start, _ in later)


def test_waves_run_their_backwards_last_micro_batch_first() -> None:
    events = simulate(job(1, micro_batches=5, wave=2, layers=2, shards=1)).events
    assert "".join(f"{e.kind[0]}{e.micro_batch}" for e in events if e.layer == 0) == "f0f1b1b0f2f3b3b2f4b4"
    assert [e.layer for e in events[:8]] == [0, 1, 0, 1, 1, 0, 1, 0]


def test_recomputing_before_the_wait_beats_recomputing_after_it() -> None:
    after = Job(24, 8, 4, 1, 1, Times(0, 1, 0), Times(0, 3, 0))
    before = replace(after, backward=Times(0, 3, 0, recompute=1))
    assert simulate(after).makespan - simulate(before).makespan == pytest.approx(7)  # (P - 1) pieces
    assert before.work == after.work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 0}, "shards = 0"),
        ({"forward": Times(0, 1, -1)}, "forward.after = -1 s"),
        ({"backward": Times(0, float("nan"), 0)}, "backward.piece = nan s"),
        ({"backward": Times(0, 1, 0, recompute=1)}, "backward.piece = 1 s, must exceed"),
        ({"forward": Times(0, 1, 0, recompute=0.5)}, "forward.recompute = 0.5 s"),
    ],
)
def test_an_impossible_job_is_refused_by_number(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(1, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (job(2, micro_batches=2, wave=2, scan=0.4, layers=2, shards=4), 4),
        (job(4, scan=0.4), 8),
        (job(4, micro_batches=4, wave=2, scan=0.4, barrier=True), 8),
    ],
    ids=["pieces", "scans", "micro-batches"],
)
def test_the_picture_is_a_png_with_a_row_per_rank(case: Job, rows: int, tmp_path: Path) -> None:
    path = tmp_path / "schedule.png"
    draw(simulate(case), path, "a wavefront")
    header = path.read_bytes()
    assert header.startswith(b"\x89PNG\r\n\x1a\n") and len(header) > 10_000
    width, height = (int.from_bytes(header[at : at + 4], "big") for at in (16, 20))
    assert width == 1920 and height == 120 * (1.5 + 0.5 * rows)
