"""`benchmark data` runs small and writes what it promises; that both readers give the same tokens it checks itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from titans_train.benchmark import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once for all parts."""
    return tmp_path_factory.mktemp("benchmark")


def figures(folder: Path, part: str, *more: str) -> Any:
    path = folder / "data.json"
    options = ["--megabytes", "1", "--rounds", "1", "--folder", str(folder), "--json", str(path), *more]
    assert main(["data", part, *options]) == 0
    return json.loads(path.read_text())[part]


def test_reading_is_measured_beside_numpy_warm_and_cold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(folder, "read")
    for row in (found["warm"], found["cold"]):
        assert all(row[key] > 1e4 for key in ("ours", "ours_wall", "numpy", "numpy_wall"))
    out = capsys.readouterr().out
    assert f"{found['warm']['ours'] / found['warm']['numpy']:.2f}" in out and "| cold |" in out


def test_start_up_and_resident_memory_are_measured_and_kept_beside_each_other(folder: Path) -> None:
    few, many = figures(folder, "start")
    assert 10 <= few["first"]["shards"] <= 12 and many["first"]["shards"] > 400  # no shard is below 4 kB
    assert 0 < many["again"]["open"] < many["again"]["batch"]
    found = figures(folder, "resident", "--batches", "400")
    assert found["batches"] == 400 and found["epochs"] > 1
    assert [at for at, _ in found["resident_mib"]] == list(range(0, 401, 20))
    assert all(50 < mib < 5000 for _, mib in found["resident_mib"])
    assert {"start", "resident"} <= set(json.loads((folder / "data.json").read_text()))


def test_preparing_is_measured_beside_the_tokenizer_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(folder, "prepare", "--megabytes", "4")
    assert 3 < found["text_mb"] <= 4 and found["medians"]["whole"]["worker_mb"] > 50
    ratio = found["medians"]["alone"]["cpu"] / found["medians"]["whole"]["cpu"]
    assert found["cpu_ratio"] == ratio and f"{ratio:.2f}" in capsys.readouterr().out
