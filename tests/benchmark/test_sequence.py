"""`benchmark sequence` runs on real processes, checks what it can, and writes what it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from titans_train.benchmark import main
from titans_train.benchmark.schedule import simulate
from titans_train.benchmark.sequence import Waits, beside_simulation, parser_of_parts, waits_of


def rows_of(folder: Path, *argv: str) -> list[dict[str, Any]]:
    path = folder / "rows.json"
    assert main(["sequence", *argv, "--json", str(path)]) == 0
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_a_schedule_is_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.png"
    sizes = ["--layers", "2", "--shards", "3", "--pieces", "2", "--micro-batches", "4", "--wave", "2"]
    times = ["--before", "1", "--piece", "4", "--after", "2", "--latency", "0.5", "--recompute", "1"]
    (row,) = rows_of(tmp_path, "schedule", *sizes, *times, "--picture", str(picture))
    # a layer: 1 + 2 x 4 + 2 ms forward, twice that and 2 x 1 backward; two waves wait twice for 4.5 + 8.5 ms
    assert row["work_ms"] == pytest.approx(8 * (11 + 24))
    assert row["makespan_ms"] == pytest.approx(row["work_ms"] + 2 * 2 * 13) == pytest.approx(row["closed_form_ms"])
    assert row["idle_ms_by_rank"] == pytest.approx([52] * 3)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| makespan | 332.0 ms |" in printed and f"| efficiency | {100 * 280 / 332:.1f} % |" in printed


def test_the_rows_of_waits_are_those_of_the_issue() -> None:
    layouts = waits_of(parser_of_parts().parse_args(["waits"]))
    scans = {(w.micro_batches, w.wave, w.pieces) for w in layouts if w.share == 1}
    assert scans == {(m, k, g) for m, k in ((1, 1), (4, 1), (4, 4)) for g in (1, 2, 4, 8)}
    assert {(w.share, w.micro_batches) for w in layouts} == {(1.0, 1), (1.0, 4), (0.4, 1)}
    assert all((w.ranks, w.layers) == (8, 24) for w in layouts)


def test_measured_seconds_are_put_beside_the_simulation() -> None:
    layout = Waits(8, 24, 1, 1, 1, 32.0, 64.0, 1.0, 3)
    row = beside_simulation(layout, {"makespan": 24 * 0.096 / 0.7, "latency_us": 0.0, "alone": 24 * 0.1, "cpu": 0.024})
    assert round(row["simulated"], 3) == 0.774 == round(simulate(layout.job()).efficiency, 3)
    assert row["ratio"] == pytest.approx(0.7 / (24 / 31))
    assert row["overhead_ms"] == pytest.approx(2.0) and row["cpu_ms"] == pytest.approx(0.5)


def test_waits_runs_the_real_messages(tmp_path: Path) -> None:
    sizes = ["--ranks", "2", "--layers", "4", "--pieces", "2", "--forward", "4", "--backward", "8"]
    rows = rows_or_slow(tmp_path, "waits", *sizes, "--micro-batches", "2", "--waves", "1", "2", "--repetitions", "1")
    assert [(r["share"], r["wave"]) for r in rows] == [(1.0, 1), (1.0, 2), (0.4, 1), (0.4, 2)]
    for row in rows:
        assert row["work"] == pytest.approx(2 * 4 * 0.012)
        assert row["makespan"] > 0.9 * row["work"] / row["simulated_without_latency"]  # sleeps are not skipped
        assert 0 < row["latency_us"] < 1e6 and 0 < row["ratio"] < 1.1 and row["cpu_ms"] > 0


def rows_or_slow(folder: Path, *argv: str) -> list[dict[str, Any]]:
    """Rows even of a machine too busy to reach the aim."""
    path = folder / "rows.json"
    main(["sequence", *argv, "--json", str(path)])
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_memory_of_a_rank_is_flat_as_ranks_are_added(tmp_path: Path) -> None:
    small = ["--width", "64", "--heads", "2", "--layers", "1", "--vocabulary", "128", "--chunk", "16"]
    one_piece = ["--pieces", "1"]  # as the whole sequence has: more pieces need less at once
    rows = rows_of(tmp_path, "memory", "--blocks", "lmm", "--ranks", "1", "2", "--tokens", "256", *small, *one_piece)
    assert [(r["ranks"], r["tokens"], len(r["peaks"])) for r in rows] == [(1, 256, 1), (2, 512, 2)]
    assert rows[0]["relative"] == 1 and 0.95 < rows[1]["relative"] < 1.05
    assert rows[0]["fixed"] < rows[0]["peak"] == max(rows[0]["peaks"])


def test_a_long_sequence_is_trained_on(tmp_path: Path) -> None:
    small = ["--width", "32", "--layers", "1", "--chunk", "32", "--checkpointing"]
    (row,) = rows_of(tmp_path, "long", "--tokens", "512", "--ranks", "2", "--steps", "2", *small)
    assert len(row["losses"]) == 2 and all(math.isfinite(loss) for loss in row["losses"])
    assert row["losses"][0] == pytest.approx(math.log(256), abs=0.3) and row["losses"][1] < row["losses"][0]
    assert all(peak > 1e5 for peak in row["peaks"]) and len(row["resident"]) == 2


@pytest.mark.long
def test_compute_compares_the_same_function(tmp_path: Path) -> None:
    small = ["--tokens", "128", "--layers", "2", "--heads", "2", "--head-dim", "16", "--chunk", "16", "--rounds", "1"]
    rows = rows_of(tmp_path, "compute", *small, "--batch", "1", "--pieces", "2")
    assert [(r["level"], r["strategy"], r["depth"]) for r in rows] == [
        (level, *kind)
        for level in ("operator", "block")
        for kind in (("wavefront", 2), ("wavefront", 1), ("affine", 1))
    ]
    for row in rows:
        assert row["loss_apart"] < 1e-5 and row["speed_up"] > 0 and row["ceiling"] > 0
    # W and S [2, 16, 16] float32 and a header for each of two pieces; [T | U] [2, 32, 48], and an adjoint [2, 32, 16]
    wave, affine = rows[1], rows[2]
    assert wave["forward_bytes"] == wave["backward_bytes"] == {"state": 2 * 2 * 16 * 16 * 4 + 2 * 40}
    assert affine["forward_bytes"] == {"map": 2 * 32 * 48 * 4}
    assert affine["backward_bytes"] == {"adjoint": 2 * 32 * 16 * 4}
