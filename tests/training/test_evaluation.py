"""Needles are looked for during a training, on its own ranks, and found alike on any layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT

CONFIG: dict[str, dict[str, Any]] = {
    "run": {"name": "needles"},
    "model": {"block": "mag", "layers": 2, "width": 16, "heads": 2, "vocabulary": 24, "initializer_std": 0.2},
    "memory": {"chunk_size": 4, "expansion": 2, "key_start": "pair"},
    "attention": {"window": 8},
    "data": {"source": "needles", "needles": {"keys": 4, "digits": 1, "symbols": 3, "words": 8}, "workers": 0},
    "training": {"steps": 4, "sequence_length": 16, "global_batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"learning_rate": 1e-2},
    "monitoring": {"validation_sequences": 4, "validate_every": 2, "tensorboard": False, "log_every": 1},
    "evaluation": {"every": 2, "needles": {"lengths": [16, 32], "depths": 3, "cases": 5}},
}


def config(folder: Path, **evaluation: Any) -> Path:
    values = CONFIG | {"run": {"name": "needles", "folder": str(folder / "runs")}}
    if evaluation:
        values["evaluation"] = evaluation
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def lines(folder: Path, name: str = "needles") -> list[dict[str, Any]]:
    path = folder / "runs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(path: Path, *settings: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "launchers/ranks.py",
        "--processes",
        str(ranks),
        "--",
        sys.executable,
        "-m",
        "titans_train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*command, "train", str(path), *settings]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_needles_are_looked_for_on_any_layout(tmp_path: Path) -> None:
    found = {}
    for name, layout in (("one", ()), ("tensor", ("parallel.tensor=2",)), ("sequence", ("parallel.sequence=2",))):
        (tmp_path / name).mkdir()
        done = train(config(tmp_path / name), *layout, ranks=1 + len(layout))
        assert done.returncode == 0, done.stderr
        assert "step 2: needles tokens: 16 tokens " in done.stdout
        found[name] = {
            line["step"]: line["needles_tokens"] for line in lines(tmp_path / name) if "needles_tokens" in line
        }
    one = found["one"]
    assert sorted(one) == [2, 4] and set(one[2]) == {"at_0000016", "at_0000032"} and 0 < one[4]["at_0000016"] < 1
    assert found["tensor"] == found["sequence"] == one
    positions = [line["validation_by_position"] for line in lines(tmp_path / "one") if "validation_by_position" in line]
    assert len(positions) == 2 and set(positions[0]) == {"to_0000016"}


def test_validation_and_samples_leave_a_sharded_training_as_it_is(tmp_path: Path) -> None:
    """ZeRO 3 gathers parameters ahead: what is asked of the model in between must not change how they are kept."""
    data = {"source": "shards", "path": str(prepare_folder(tmp_path)), "needles": None}
    model = CONFIG["model"] | {"vocabulary": 257}
    losses = {}
    for name, every in (("asked", 1), ("left", 100)):
        path = config(tmp_path)
        watch = CONFIG["monitoring"] | {"sample_every": every, "sample_tokens": 3, "validate_every": every}
        values = yaml.safe_load(path.read_text())
        values |= {"run": values["run"] | {"name": name}, "data": values["data"] | data, "model": model}
        del values["evaluation"]
        path.write_text(yaml.safe_dump(values | {"monitoring": watch, "parallel": {"zero_stage": 3}}))
        done = train(path, ranks=2)
        assert done.returncode == 0, done.stderr
        assert (f"step {CONFIG['training']['steps']}, sample:" in done.stdout) == (every == 1)
        losses[name] = [line["loss"] for line in lines(tmp_path, name) if "loss" in line]
    assert losses["asked"] == losses["left"] and len(losses["left"]) == CONFIG["training"]["steps"]


def test_what_cannot_be_asked_is_refused_before_the_first_step(tmp_path: Path) -> None:
    done = train(config(tmp_path, every=2, needles={"lengths": [4]}))
    assert done.returncode == 2
    assert "(needles + 1) * (2 + digits) = 6 tokens, sequences have 4" in done.stderr
    assert not (tmp_path / "runs" / "needles" / "metrics.jsonl").exists()
