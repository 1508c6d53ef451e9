"""benchmark ablations: equal parameters, resumption, and a table that says what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from titans_train.benchmark.ablations import main
from titans_train.benchmark.ablations.report import sign, table
from titans_train.benchmark.ablations.variants import FOLDER, TASKS, Run, count, load_variants, runs
from titans_train.errors import UserError

VARIANTS = load_variants()
TINY = [
    "model.width=16", "model.heads=2", "model.feed_forward=64", "training.steps=2", "optimizer.warmup_steps=0",
    "training.sequence_length=64", "attention.segment=32", "monitoring.validation_sequences=2", "data.workers=0",
]  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_variant_has_the_parameters_of_the_reference_within_2_percent(task: str, tmp_path: Path) -> None:
    run_folder = [f"run.folder={tmp_path}"]
    counts = {v.name: count(Run(task, v, 0).config(FOLDER, run_folder)) for v in VARIANTS if task in v.tasks}
    assert all(abs(n / counts["lmm"] - 1) <= 0.02 for n in counts.values()), counts


def test_what_the_issue_of_ablations_names_is_there_and_first_seeds_come_first() -> None:
    names = {v.name for v in VARIANTS}
    assert names >= {"lmm", "mac", "mag", "mal", "transformer", "linear memory", "no momentum", "no forgetting",
                     "no convolution", "no persistent tokens", "chunk 1", "chunk 256", "depth 1", "depth 4",
                     "TTT-linear", "TTT-MLP", "DeltaNet", "Gated DeltaNet", "Mamba2", "RWKV-7"}  # fmt: skip
    order = list(runs(VARIANTS, list(TASKS)))
    assert [run.seed for run in order] == sorted(run.seed for run in order)
    assert {run.variant.name for run in order if run.seed == 2} == {"lmm", "mag", "lmm, memory off", "mag, memory off"}


def test_a_suite_goes_on_where_it_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "suite.json"
    words = [*TINY, "--tasks", "needles", "--cases", "1", "--folder", str(tmp_path / "runs"), "--workers", "2",
             "--json", str(out), "--pictures", str(tmp_path / "pictures"), "--seeds", "1"]  # fmt: skip
    assert main([*words, "--variants", "lmm"]) == 0
    first = json.loads(out.read_text())
    written = (tmp_path / "runs" / "needles-lmm-0.json").stat().st_mtime_ns
    assert main([*words, "--variants", "lmm", "Gated DeltaNet"]) == 0
    both = json.loads(out.read_text())
    assert [r["variant"] for r in both] == ["lmm", "Gated DeltaNet"] and both[0] == first[0]
    assert (tmp_path / "runs" / "needles-lmm-0.json").stat().st_mtime_ns == written
    assert both[1]["config"]["memory"]["rule"] == "gated_deltanet"
    assert [row["length"] for row in both[1]["figures"]["needles"]] == [64, 128, 256, 512]
    assert all(row["cases"] == 5 for row in both[1]["figures"]["needles"])
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"ablations.png", "ablations_needles.png"}
    printed = capsys.readouterr().out
    assert "| Gated DeltaNet |" in printed and "needles at 4x" in printed


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "needles-lmm-0").write_text("in the way of the run folder")
    words = ["--tasks", "needles", "--cases", "1", "--folder", str(tmp_path / "runs"), "--seeds", "1"]
    assert main([*TINY, *words, "--variants", "lmm", "Mamba2"]) == 1
    captured = capsys.readouterr()
    assert "needles-lmm-0 failed: train" in captured.err and "| Mamba2 |" in captured.out


def test_wrong_names_and_missing_data_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no variant 'lstm'; there are lmm, mac"):
        main(["--variants", "lstm", "--folder", str(tmp_path)])
    with pytest.raises(UserError, match="data_prep --default-corpus"):
        main([f"data.path={tmp_path}/none", "--tasks", "text", "--folder", str(tmp_path), "--variants", "lmm"])


def result(variant: str, seed: int, loss: float) -> dict[str, Any]:
    return {"task": "text", "variant": variant, "seed": seed, "parameters": 1000, "figures": {"loss": loss}}


def test_signs_are_given_only_beyond_the_noise_of_seeds() -> None:
    results = [result("lmm", seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    results += [result("mac", 0, 1.5), result("mag", 0, 2.15), result("mal", 0, 2.6)]
    assert [sign(results, name, "text, loss") for name in ("mac", "mag", "mal", "transformer")] == ["+", "=", "-", "?"]
    lines = table(results, VARIANTS).splitlines()
    assert lines[2] == "| lmm | 1,000 | 2.1000 ± 0.1000 |  | 0, 0 |"
    assert lines[3] == "| mac | 1,000 | 1.5000 | +, ? | +, + |"
