"""A checkpoint means the same on every layout: every tensor by name, over a chain of layouts on 4 real ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT, torchrun
from tests.training.reshard_worker import LAYOUTS, STEPS, layouts_of
from titans_train.monitoring.metrics import read_metrics


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_by_name_is_restored_exactly_on_every_layout(tmp_path: Path, prepared: Path, dtype: str) -> None:
    """Parameters (fp32 master weights), both moments, carried states, random state; and the next step's loss."""
    done = torchrun(4, str(ROOT / "tests/training/reshard_worker.py"), str(tmp_path), str(prepared), dtype)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    found = json.loads((tmp_path / f"{dtype}.json").read_text())
    assert found["said"] == []
    assert [tuple(r["layout"]) for r in found["results"]] == layouts_of(dtype)[1:]
    for result in found["results"]:
        layout = tuple(result.pop("layout"))
        exact = {"parameters": 0.0, "exp_avg": 0.0, "exp_avg_sq": 0.0, "carried": 0.0}
        assert result == {**exact, "step": STEPS, "optimizer_step": STEPS, "random": True}, layout
    losses = [last(tmp_path / f"{dtype}-{n}") for n in range(1, len(found["results"]) + 1)]
    assert max(losses) - min(losses) < (2e-6 if dtype == "float32" else 0.02), losses


def last(run: Path) -> float:
    """Loss of the step that was trained after the checkpoint."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [STEPS + 1]
    return float(lines[0]["loss"])


def test_the_chain_has_zero_3_with_tensor_and_sequence_shards_on_both_sides() -> None:
    pairs = list(zip(LAYOUTS, LAYOUTS[1:], strict=False))
    assert len(pairs) >= 8 and len(set(LAYOUTS)) == len(LAYOUTS)
    written, read = [a for a, _ in pairs], [b for _, b in pairs]
    assert (2, 2, 3) in written and (2, 2, 3) in read
    for stage in range(4):
        assert any(s == stage for _, _, s in written) and any(s == stage for _, _, s in read)
