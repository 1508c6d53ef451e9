"""metrics.jsonl and TensorBoard on resume: what an interrupted run wrote after its checkpoint is dropped."""

from __future__ import annotations

import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from titans_train.monitoring.console import duration
from titans_train.monitoring.metrics import Metrics
from titans_train.monitoring.throughput import measured_peak_flops, peak_memory_bytes


def test_later_lines_are_dropped_on_resume_and_tensorboard_agrees(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0, tensorboard=True)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "layer_0": {"alpha": 0.5}})
    first.close()
    again = Metrics(tmp_path, 3, tensorboard=True)
    again.write(4, {"loss": 40.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert "layer_0/alpha" in events.Tags()["scalars"]


def test_figures_that_are_not_finite_are_left_out_of_both(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, tensorboard=True)
    metrics.write(1, {"loss": float("nan"), "tokens": 7, "layer_0": {"alpha": float("inf"), "eta": 0.5}})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "tokens": 7, "layer_0": {"eta": 0.5}}
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert sorted(tags) == ["layer_0/eta", "tokens"]


def test_durations_and_device_figures_are_plausible() -> None:
    assert duration(59) == "0m59s" and duration(3661) == "1h01m"
    assert measured_peak_flops(256, 1) > 1e8 and peak_memory_bytes() > 10 * 2**20
