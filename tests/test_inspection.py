"""The verb inspect: what it says of a checkpoint is what lies in it, and damage is told, not hidden."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.inference.checkpoints import config, write_checkpoint
from titans_train.__main__ import main
from titans_train.inspection import figures
from titans_train.training.manifest import read_manifest, sha256_of, write_manifest

Capture = pytest.CaptureFixture[str]
FILE = "rank-00000.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(config(tmp_path / "runs"))


def report(capsys: Capture, path: Path, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_figure_is_of_the_tensor_that_lies_there(checkpoint: Path, capsys: Capture) -> None:
    found, tensors = report(capsys, checkpoint), load_file(str(checkpoint / FILE))
    rows = {row["name"]: row for row in found["parameters"]}
    assert rows.keys() == {name.removeprefix("parameters/") for name in tensors if name.startswith("parameters/")}
    for name, row in rows.items():
        value = tensors[f"parameters/{name}"].double()
        expected = (value.norm(), value.min(), value.max(), value.abs().mean())
        assert [row["value"][key] for key in ("norm", "min", "max", "mean_abs")] == pytest.approx(
            [float(number) for number in expected], rel=1e-9
        )
        for kind in ("exp_avg", "exp_avg_sq"):
            assert row[kind] == pytest.approx(float(tensors[f"{kind}/{name}"].double().norm()), rel=1e-9)
    assert found["parameter_count"] == sum(t.numel() for n, t in tensors.items() if n.startswith("parameters/"))
    assert (found["step"], found["block"], found["run"], found["tokens"]) == (10, "mag", "tiny", 1280)
    assert found["layout"]["zero_stage"] == 1 and found["batch_sizes"] == [[0, 2]]
    assert found["files"] == {FILE: {"bytes": (checkpoint / FILE).stat().st_size, "state": "ok"}}


def test_figures_of_blocks_are_those_of_the_whole() -> None:
    value = torch.randn((1 << 22) + 77, generator=torch.Generator().manual_seed(0))
    value[5], value[-1], value[1 << 22] = float("nan"), float("inf"), -float("inf")
    found, finite = figures(value), value[value.isfinite()].double()
    assert found.nonfinite == 3
    assert (found.norm, found.mean_abs) == pytest.approx((float(finite.norm()), float(finite.abs().mean())), rel=1e-12)
    assert (found.min, found.max) == (float(finite.min()), float(finite.max()))
    assert figures(torch.full((3,), float("nan"))).nonfinite == 3 and figures(torch.empty(0)).norm == 0


def test_of_a_run_the_newest_and_of_an_export_what_it_has(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    newest = write_checkpoint(config(tmp_path / "runs"), step=20, seed=1)
    assert report(capsys, checkpoint.parents[1])["path"] == str(newest)
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    exported, found = report(capsys, tmp_path / "out"), report(capsys, checkpoint)
    assert exported["kind"] == "export" and len(exported["files"]) == 4
    by_name = {row["name"]: row["value"] for row in exported["parameters"]}
    assert by_name == {row["name"]: row["value"] for row in found["parameters"]}
    assert all(row["exp_avg"] is None for row in exported["parameters"])


def test_the_text_names_all_of_it(checkpoint: Path, capsys: Capture) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    text = capsys.readouterr().out
    assert f"{checkpoint}: checkpoint of run tiny, step 10" in text and "model mag" in text
    assert f"{FILE}: {(checkpoint / FILE).stat().st_size:,} bytes, ok" in text
    assert all(name in text for name in read_manifest(checkpoint)["tensors"])
    assert text.endswith("every file is as it was written, every value is finite\n")


def test_values_that_are_not_finite_are_counted_and_named(checkpoint: Path, capsys: Capture) -> None:
    tensors = load_file(str(checkpoint / FILE))
    name = next(name for name in read_manifest(checkpoint)["tensors"])
    tensors[f"parameters/{name}"][3] = float("nan")
    tensors[f"exp_avg_sq/{name}"][:2] = float("inf")
    save_file(tensors, str(checkpoint / FILE))
    manifest = read_manifest(checkpoint)
    manifest["files"][FILE] = {"bytes": (checkpoint / FILE).stat().st_size, "sha256": sha256_of(checkpoint / FILE)}
    write_manifest(checkpoint, manifest)
    rows = {row["name"]: row for row in report(capsys, checkpoint, status=1)["parameters"]}
    assert {name: row["nonfinite"] for name, row in rows.items() if row["nonfinite"]} == {name: 3}
    assert main(["inspect", str(checkpoint)]) == 1
    assert "3 NOT FINITE" in (text := capsys.readouterr().out) and "0 damaged files, 1 parameters" in text


def test_a_damaged_file_is_named_and_the_rest_is_shown(checkpoint: Path, capsys: Capture) -> None:
    content = (checkpoint / FILE).read_bytes()
    (checkpoint / FILE).write_bytes(content[:-1] + b"!")
    found = report(capsys, checkpoint, status=1)
    assert "is damaged: sha256" in found["files"][FILE]["state"] and len(found["parameters"]) > 10
    (checkpoint / FILE).write_bytes(content[: len(content) // 2])
    found = report(capsys, checkpoint, status=1)
    assert "bytes, expected" in found["files"][FILE]["state"]
    assert all("cannot be read" in row["problem"] for row in found["parameters"])
    (checkpoint / FILE).unlink()
    assert "missing" in report(capsys, checkpoint, status=1)["files"][FILE]["state"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert "is no checkpoint, no export and no run" in capsys.readouterr().err


def test_no_process_group_and_no_gpu_is_asked_for(checkpoint: Path) -> None:
    program = (
        "import sys, torch; from titans_train.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or torch.distributed.is_initialized() or torch.cuda.is_initialized())"
    )
    subprocess.run([sys.executable, "-c", program, "inspect", str(checkpoint)], timeout=120, check=True)
