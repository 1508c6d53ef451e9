"""benchmark ablations: equal parameters, resumption, and a table that says what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    assert {run.variant.name for run in order if run.seed == 2} == {
        "lmm",
        "mag",
        "lmm, memory off",
        "mag, memory off",
        "transformer",
        "transformer, window",
    }


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
    assert [row["length"] for row in both[1]["figures"]["needles"]] == [64, 256, 1024, 4096]
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
    assert "needles-lmm-0 failed: Failed: train" in captured.err and "| Mamba2 |" in captured.out


def test_a_folder_with_another_run_or_another_number_of_cases_is_not_taken_for_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = ["--tasks", "needles", "--folder", str(tmp_path / "runs"), "--variants", "lmm", "--json", str(out)]
    assert main([*TINY, *words, "--seeds", "1", "--cases", "1"]) == 0
    (first,) = json.loads(out.read_text())
    (tmp_path / "runs" / "needles-lmm-0.json").write_text("[]")
    assert main([*TINY, *words, "--seeds", "1", "--cases", "2"]) == 0
    (again,) = json.loads(out.read_text())
    assert [row["cases"] for row in again["figures"]["needles"]] == [10] * 4 and again["cases"] == 2
    assert again["figures"]["loss"] == first["figures"]["loss"] and again["cpu_seconds"] > first["cpu_seconds"]
    assert main([*(w.replace("steps=2", "steps=3") for w in TINY), *words, "--seeds", "1", "--cases", "2"]) == 1
    assert "has a run with other settings; remove it" in capsys.readouterr().err
    assert json.loads(out.read_text()) == []


def test_ctrl_c_ends_the_suite_and_nothing_new_begins(tmp_path: Path) -> None:
    words = ["--tasks", "needles", "--folder", str(tmp_path), "--variants", "lmm", "no forgetting", "--workers", "1"]
    tiny = [w.replace("training.steps=2", "training.steps=100000") for w in TINY]
    command = [sys.executable, "-m", "titans_train", "benchmark", "ablations", *tiny, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        log = tmp_path / "needles-lmm-0.log"
        while not (log.exists() and "step" in log.read_text()):
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "the same command goes on from here" in error
    assert not (tmp_path / "needles-no-forgetting-0.log").exists()


def test_wrong_names_and_missing_data_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no variant 'lstm'; there are: lmm; mac"):
        main(["--variants", "lstm", "--folder", str(tmp_path)])
    with pytest.raises(UserError, match="data_prep --default-corpus"):
        main([f"data.path={tmp_path}/none", "--tasks", "text", "--folder", str(tmp_path), "--variants", "lmm"])
    with pytest.raises(UserError, match="--workers is 0"):
        main(["--workers", "0", "--folder", str(tmp_path)])
    with pytest.raises(UserError, match="there is no folder"):
        main(["--json", str(tmp_path / "none" / "x.json"), "--folder", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give another folder"):
        main(["--folder", str(tmp_path / "file")])


def result(variant: str, seed: int, loss: float) -> dict[str, Any]:
    return {"task": "text", "variant": variant, "seed": seed, "parameters": 1000, "figures": {"loss": loss}}


def test_signs_are_given_only_beyond_the_noise_of_seeds() -> None:
    results = [result("lmm", seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    results += [result("mac", 0, 1.95), result("mag", 0, 1.96), result("mal", 0, 2.07), result("depth 1", 2, 2.23)]
    # seeds differ by 0.1, but the differences to lmm by 0.01: 0.05, 0.06, 0.04
    results += [result("depth 3", seed, loss) for seed, loss in enumerate((2.05, 2.16, 2.24))]
    results += [result("depth 4", 0, float("nan")), result("transformer", 7, 1.0)]
    names = ("mac", "mag", "mal", "depth 1", "depth 3", "depth 4", "transformer", "chunk 1")
    # t quantile 4.303 for 2 degrees of freedom: 0.043 of a loss for one seed, 0.025 for three
    assert [sign(results, name, "text, loss") for name in names] == ["+", "=", "-", "=", "-", "?", "?", "?"]
    assert sign([r for r in results if r["seed"] == 0], "mac", "text, loss") == "?"
    lines = table(results, VARIANTS).splitlines()
    assert lines[2] == "| lmm | 1,000 |  | 2.1000 ± 0.1000 |  | 0, 0 |"
    assert lines[3] == "| mac | 1,000 | -0.0500 | 1.9500 | +, ? | +, + |"
    assert "| depth 3 | 1,000 | +0.0500 ± 0.0100 | 2.1500 ± 0.0954 | -, ? |  |" in lines


def test_a_needle_more_or_less_is_noise() -> None:
    def found(variant: str, seed: int, share: float) -> dict[str, Any]:
        row = {"accuracy": share, "cases": 100}
        return {"task": "needles", "variant": variant, "seed": seed, "parameters": 9, "figures": {"needles": [row] * 4}}

    results = [found("lmm", seed, 1.0) for seed in range(3)]
    results += [found("mac", seed, 0.99) for seed in range(3)] + [found("mag", 0, 0.5)]
    assert [sign(results, name, "needles at 4x") for name in ("mac", "mag")] == ["=", "-"]
