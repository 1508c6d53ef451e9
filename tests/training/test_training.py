"""A run on 2 real ranks: it resumes bit for bit under every ZeRO stage, and leaves the files it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT, torchrun
from tests.training.worker import STEPS, plan_of
from titans_train.errors import UserError
from titans_train.monitoring.metrics import read_metrics
from titans_train.parallel.pieces import KINDS
from titans_train.training import run_folder
from titans_train.training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    folder = Path(tmp_path_factory.mktemp("runs"))
    done = torchrun(2, str(ROOT / "tests/training/worker.py"), str(folder), str(prepared))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (folder / "console.txt").write_text(done.stdout)
    (folder / "errors.txt").write_text(done.stderr)
    return folder


def last(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = Checkpoint.open(run / "checkpoints" / f"step-{STEPS:08d}")
    return {kind: {name: found.tensor(kind, name) for name in found.names()} for kind in KINDS}


def lines(run: Path, key: str = "loss") -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in read_metrics(run / "metrics.jsonl") if key in line]


@pytest.mark.parametrize("stage", range(4))
def test_stop_and_resume_equals_the_uninterrupted_run_bit_for_bit(runs: Path, stage: int) -> None:
    whole, parts = runs / f"whole-{stage}", runs / f"parts-{stage}"
    assert lines(whole) == lines(parts) and [s for s, _ in lines(whole)] == list(range(1, STEPS + 1))
    assert lines(whole, "grad_norm") == lines(parts, "grad_norm")
    assert lines(whole, "validation_loss") == lines(parts, "validation_loss")
    for name, tensors in last(whole).items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, last(parts)[name][key]), (name, key)


def test_a_run_goes_on_under_another_stage_and_micro_batch(runs: Path) -> None:
    for (step, a), (_, b) in zip(lines(runs / "moved"), lines(runs / "whole-1"), strict=True):
        assert a == pytest.approx(b, abs=1e-5), step


@pytest.mark.parametrize("run", ["split", "to-data", "to-tensor", "shards", "to-shards"])
def test_a_run_is_the_same_on_every_layout_and_moves_between_them(runs: Path, run: str) -> None:
    for key in ("loss", "grad_norm", "validation_loss"):
        for (step, a), (other, b) in zip(lines(runs / run, key), lines(runs / "whole-1", key), strict=True):
            assert step == other and a == pytest.approx(b, abs=1e-4 if key == "grad_norm" else 1e-5), (key, step)
    ours, theirs = (read_metrics(runs / name / "metrics.jsonl")[0]["layer_1"] for name in (run, "whole-1"))
    assert ours == pytest.approx(theirs, rel=1e-4)  # means over all heads and sequences, wherever they are
    ours, theirs = last(runs / run)["parameters"], last(runs / "whole-1")["parameters"]
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-4, name


def test_rows_go_on_in_the_next_batch_on_every_layout_and_over_a_resume(runs: Path) -> None:
    """Two sequence shards, then two halves of the heads, then two halves of the batch; against the last from the start.

    tests/training/test_carried.py shows that what is carried is right.
    """
    for key in ("loss", "grad_norm"):
        ours, theirs = lines(runs / "carried-shards", key), lines(runs / "carried", key)
        assert [s for s, _ in ours] == list(range(1, STEPS + 1))
        assert [v for _, v in ours] == pytest.approx([v for _, v in theirs], abs=1e-4)
    files = list((runs / "carried" / "checkpoints" / f"step-{STEPS:08d}").glob("carried-*"))
    assert sorted(f.name for f in files) == ["carried-00000000.safetensors", "carried-00000002.safetensors"]


def test_ranks_share_the_tokens_of_the_last_validation_batch_too(runs: Path) -> None:
    summary = json.loads((runs / "odd" / "summary.json").read_text())
    assert summary["validation_tokens"] == 5 * 65


def test_bf16_keeps_fp32_master_weights_and_resumes(runs: Path) -> None:
    assert [s for s, _ in lines(runs / "bf16")] == list(range(1, STEPS + 1))
    for (_, a), (_, b) in zip(lines(runs / "bf16"), lines(runs / "whole-2"), strict=True):
        assert a == pytest.approx(b, abs=0.05)
    weights = last(runs / "bf16")["parameters"]
    assert any(not torch.equal(w, w.bfloat16().float()) for w in weights.values())


def test_the_run_folder_holds_what_it_promises(runs: Path) -> None:
    run = runs / "whole-1"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.yaml", "plan.json", "plan.txt", "metrics.jsonl", "tensorboard", "checkpoints", "loss.png",
        "summary.json", "libraries.log",
    }  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    assert summary["validation_loss"] > 0 and summary["validation_bits_per_byte"] > 0
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 0
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    line = read_metrics(run / "metrics.jsonl")[0]
    assert {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu"} <= line.keys()
    assert set(line["layer_0"]) == {"surprise", "alpha", "eta", "theta", "weight_norm", "momentum_norm"}
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000004", "step-00000005"]


def test_tensorboard_reads_the_same_figures(runs: Path) -> None:
    events = EventAccumulator(str(runs / "parts-1" / "tensorboard")).Reload()
    written = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [s for s, _ in written] == list(range(1, STEPS + 1))
    for (_, a), (_, b) in zip(written, lines(runs / "parts-1"), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert {"grad_norm", "learning_rate", "tokens_per_second", "layer_1/alpha"} <= set(events.Tags()["scalars"])


def test_the_console_shows_the_run_and_not_the_libraries(runs: Path) -> None:
    console = (runs / "console.txt").read_text()
    assert "step 5/5" in console and "left" in console and "finished" in console
    assert (
        console.count("step 4, sample:\ndef ") == 4 + 4 + 2 + 3 + 4
    )  # whole and resumed runs of four stages; moved and bf16; layouts; shards and carried
    for noise in ("Warning", "[INFO]", "deepspeed", "DeepSpeed"):
        assert noise not in console
    assert "Transformer Engine" not in (runs / "errors.txt").read_text()


def test_a_folder_of_another_run_is_refused_and_untouched(runs: Path, prepared: Path) -> None:
    before = (runs / "whole-1" / "plan.json").read_bytes()
    other = plan_of(runs, prepared, "whole-1", 1, 2, memory={"chunk_size": 16}, optimizer={"learning_rate": 1e-3})
    with pytest.raises(UserError, match="(?s)memory.chunk_size: 8 there, 16 here.*optimizer.learning_rate"):
        run_folder.check(other)
    run_folder.check(plan_of(runs, prepared, "whole-1", 3, 1, training={"steps": 99}, checkpoint={"every": 7}))
    assert (runs / "whole-1" / "plan.json").read_bytes() == before


def test_refusals_end_all_ranks_with_one_plain_message(runs: Path, prepared: Path, tmp_path: Path) -> None:
    from titans_train.config import dump_config

    config = tmp_path / "config.yaml"
    config.write_text(dump_config(plan_of(runs, prepared, "whole-1", 1, 2).config))
    done = torchrun(2, "-m", "titans_train", "train", str(config), "optimizer.beta1=0.5")
    assert done.returncode != 0
    assert done.stderr.count("optimizer.beta1: 0.9 there, 0.5 here") == 1
    assert "in train_on" not in done.stderr  # no traceback of ours
