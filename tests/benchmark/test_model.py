"""`benchmark model` and `benchmark profile` run training's own steps, and say where their time goes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from tests.hostile.refusals import refused
from titans_train.__main__ import main
from titans_train.benchmark.model import cases_of, parser
from titans_train.benchmark.profile import group_of
from titans_train.benchmark.step_parts import PARTS, PHASES, Timeline, as_part
from titans_train.benchmark.training_steps import plan_of, split_overrides

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
TINY = ["model.layers=1", "model.width=32", "model.heads=2", "memory.chunk_size=16", "attention.window=16",
        "training.sequence_length=64", "training.micro_batch_size=2"]  # fmt: skip


def test_a_step_is_measured_whole_and_by_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    options = ["--configs", str(QUICKSTART), "--blocks", "mag", "--steps", "2", "--micro-batches", "2"]
    peak = ["--peak-tflops", "0.5", "--device", "cpu", "--json", str(path)]
    assert main(["benchmark", "model", *options, *peak, *TINY]) == 0
    found = json.loads(path.read_text())
    figures = found["cases"]["quickstart mag, L=64"]
    plan = plan_of(QUICKSTART, TINY, 2)
    assert plan.tokens_per_step == 2 * 2 * 64 and figures["parameters"] == plan.parameter_count
    assert figures["tokens_per_second"] == pytest.approx(plan.tokens_per_step / figures["step_seconds"])
    assert figures["mfu"] == pytest.approx(plan.flops_per_token * figures["tokens_per_second"] / 0.5e12)
    phases = {phase: figures[f"{phase}_seconds"] for phase in PHASES}
    assert all(took > 0 for took in phases.values())
    assert sum(phases.values()) == pytest.approx(figures["watched_step_seconds"], rel=0.05)
    for phase in ("forward", "backward"):
        parts = {part: figures[f"{phase}_{part}_seconds"] for part in PARTS}
        assert all(took > 0 for took in parts.values()), (phase, parts)
        assert sum(parts.values()) == pytest.approx(phases[phase])
    assert figures["peak_mib"] > 50 and found["about"]["dtype"] == "float32" and found["about"]["micro_batches"] == 2
    said = capsys.readouterr().out
    assert "| quickstart mag, L=64 | 0.0M |" in said and "feed-forward" in said


@pytest.mark.gpu
def test_a_step_is_measured_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    options = ["--configs", str(QUICKSTART), "--blocks", "mag", "mac", "--steps", "2", "--device", "cuda"]
    changed = ["run.dtype=bfloat16", "attention.segment=128"]
    assert main(["benchmark", "model", *options, "--json", str(path), *changed]) == 0
    for figures in json.loads(path.read_text())["cases"].values():
        phases = sum(figures[f"{phase}_seconds"] for phase in PHASES)
        assert phases == pytest.approx(figures["watched_step_seconds"], rel=0.1)
        assert 0 < figures["mfu"] < 1 and figures["backward_attention_seconds"] > 0


@pytest.mark.gpu
def test_a_profile_of_a_gpu_has_the_time_of_its_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    options = ["--output", str(path), "--steps", "1", "--device", "cuda"]
    assert main(["benchmark", "profile", str(QUICKSTART), *options]) == 0
    said = capsys.readouterr().out
    assert "self time on the GPU" in said and "| matmul | 0.00 |" not in said and path.stat().st_size > 1000


def test_the_sizes_are_each_block_beside_the_transformer_at_the_same_tokens() -> None:
    options = parser().parse_args(["--lengths", "4096", "16384", "--micro-batches", "3"])
    cases = cases_of(options, [])
    blocks = ("transformer", "lmm", "mac", "mag", "mal")
    assert list(cases) == [f"{s} {b}, L={n}" for s in ("340M", "760M") for b in blocks for n in (4096, 16384)]
    assert {case.plan.tokens_per_step for case in cases.values()} == {3 * 16384}
    assert {case.plan.config.run.dtype for case in cases.values()} == {"bfloat16"}
    assert all(0.95 < case.plan.parameter_count / (float(case.source[:-1]) * 1e6) < 1.05 for case in cases.values())


def test_overrides_may_stand_anywhere() -> None:
    argv = ["--configs", "a=b/c.yaml", "model.layers=1", "--lengths", "64", "attention.window=16", "--steps", "2"]
    assert split_overrides(argv) == (
        ["model.layers=1", "attention.window=16"], ["--configs", "a=b/c.yaml", "--lengths", "64", "--steps", "2"]
    )  # fmt: skip


def test_borders_change_no_value_and_take_the_backward_in_turn() -> None:
    timeline = Timeline("cpu")
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    inner = as_part(lambda t: (t["a"] * 3, "state"), "memory", timeline)
    outer = as_part(lambda y: inner({"a": y})[0] + 1, "attention", timeline)
    y = outer(x * 2)
    before = len(timeline.marks)
    (y * y).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 2 * (6 * x.detach() + 1) * 6)
    assert [part for _, _, part in timeline.marks[:before]] == ["attention", "attention", "attention", "rest"]
    assert [part for _, _, part in timeline.marks[before:]] == ["attention", "attention", "attention", "rest"]
    timeline.marks = [(1.0, "forward", "memory"), (3.0, "forward", "rest"), (4.0, "backward", "memory"), (8.0, "", "")]
    assert timeline.seconds() == {("forward", "memory"): 2, ("forward", "rest"): 1, ("backward", "memory"): 4}


def test_a_profile_leaves_a_trace_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json.gz"
    options = ["--output", str(path), "--steps", "1", "--device", "cpu"]
    assert main(["benchmark", "profile", str(QUICKSTART), *TINY, *options]) == 0
    with gzip.open(path) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"training step", "forward", "backward", "optimizer", "aten::mm", "_ScanBackward"} <= names
    said = capsys.readouterr().out
    shares = {row[1].strip(): float(row[3].strip(" %")) for row in map(lambda line: line.split("|"), said.splitlines())
              if len(row) == 5 and row[3].strip().endswith("%")}  # fmt: skip
    groups = [shares[name] for name in ("matmul", "attention", "memory scan", "element-wise", "optimizer", "other")]
    assert all(share > 0 for share in groups) and "128 tokens per step" in said and "https://ui.perfetto.dev" in said


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::mm", "matmul"), ("aten::baddbmm_", "matmul"), ("aten::mul_", "element-wise"), ("aten::copy_", "copies"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"), ("aten::view", "views"),
        ("_ScanBackward", "memory scan"), ("titans_train::scan_forward", "memory scan"), ("MmBackward0", "other"),
        ("aten::_fused_adamw_", "optimizer"),
    ],
)  # fmt: skip
def test_operators_have_a_group(name: str, group: str) -> None:
    assert group_of(name, optimizing=False) == group and group_of(name, optimizing=True) == "optimizer"


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(verb: str, *argv: str) -> str:
        return refused(capsys, "benchmark", verb, *argv)

    assert "--steps is 0; it is above 0" in error("model", "--steps", "0")
    assert "there is no file" in error("model", "--configs", str(tmp_path / "none.yaml"))
    assert "model.layer" in error("model", "--configs", str(QUICKSTART), "model.layer=2")
    assert "not a multiple of parallel.tensor" in error("model", "--configs", str(QUICKSTART), "parallel.tensor=2")
    assert "its name ends in .json.gz" in error("profile", str(QUICKSTART), "--output", str(tmp_path / "trace.txt"))
    assert "there is no folder" in error("profile", str(QUICKSTART), "--output", str(tmp_path / "a" / "t.json.gz"))
    if not torch.cuda.is_available():
        assert "torch sees no GPU" in error("profile", str(QUICKSTART), "--device", "cuda", "--output", "t.json")
