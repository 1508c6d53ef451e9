"""What goes wrong on one rank of several: noticed by all, answered by all alike, and named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT, torchrun
from tests.training.faults_worker import BAD_STEP, COMPARED, SKIPS
from tests.training.worker import STEPS
from titans_train.monitoring.metrics import read_metrics
from titans_train.parallel.replicas import _odd, checksum
from titans_train.training.reports import late_rank, slowest


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("corpus"))


def run(folder: Path, prepared: Path, ranks: int, what: str) -> Path:
    done = torchrun(ranks, str(ROOT / "tests/training/faults_worker.py"), str(folder), str(prepared), what)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (folder / "console.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return run(tmp_path_factory.mktemp("two"), prepared, 2, "skips")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return run(tmp_path_factory.mktemp("four"), prepared, 4, "slow")


def found(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank says of a case."""
    ranks = [path.read_text().splitlines() for path in sorted(folder.glob("found-*.jsonl"))]
    return [next(f for f in map(json.loads, lines) if f["name"] == name) for lines in ranks]


def figures(run: Path, key: str) -> dict[int, Any]:
    return {line["step"]: line[key] for line in read_metrics(run / "metrics.jsonl") if key in line}


def checkpoint(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"))
    return {f"{file.name} {key}": t for file in files for key, t in load_file(str(file)).items()}


# ---- a loss or a gradient that is not finite


@pytest.mark.parametrize("name", SKIPS)
def test_nothing_moves_on_any_rank_in_a_step_that_is_not_finite_on_one(two: Path, name: str) -> None:
    for rank in found(two, name):
        assert rank["applied"] is False and rank["moved"] == 0 and rank["tensors"] > 30, rank


@pytest.mark.parametrize("name", SKIPS)
def test_a_run_goes_on_as_if_the_step_had_not_been(two: Path, name: str) -> None:
    skipped, withheld = two / f"{name}-skipped", two / f"{name}-withheld"
    for key in ("loss", "grad_norm", "learning_rate"):
        ours, theirs = figures(skipped, key), figures(withheld, key)
        for curve in (ours, theirs):
            curve.pop(BAD_STEP, None)
        assert ours == theirs and set(ours) == set(range(1, STEPS + 1)) - {BAD_STEP}, key
    ours, theirs = checkpoint(skipped), checkpoint(withheld)
    assert ours.keys() == theirs.keys() and len(ours) > 30
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_samples_and_the_memories_of_a_step_that_was_passed_over_are_kept(two: Path) -> None:
    for name, losses in (("loss-0", ["inf"]), ("bf16-loss", ["inf"]), ("stage-1", [])):
        run = two / f"{name}-skipped"
        record = json.loads((run / "nonfinite" / f"step-{BAD_STEP}.json").read_text(), parse_constant=pytest.fail)
        assert not math.isfinite(float(record["gradient_norm"])) and isinstance(record["gradient_norm"], str)
        assert [x for r in record["ranks"].values() for x in r["losses"] if isinstance(x, str)] == losses
        assert record["ranks_with_nonfinite_loss"] == [1] * len(losses)
        ids = [i for rank in record["ranks"].values() for batch in rank["sample_ids"] for i in batch]
        assert sorted(ids) == list(range(4 * (BAD_STEP - 1), 4 * BAD_STEP))  # the whole global batch, in order
        for rank in record["ranks"].values():
            assert set(rank["layers"]) == {"layer_0", "layer_1"}
            assert all(math.isfinite(value) for value in rank["layers"]["layer_0"].values())
        assert figures(run, "skipped_steps") == {1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
        assert list((two / f"{name}-withheld").glob("nonfinite/*")) == []


def test_more_such_steps_than_the_budget_end_the_run_on_every_rank(two: Path) -> None:
    first, second = (rank["error"] for rank in found(two, "budget"))
    assert first == second and "the loss of rank 0 is not finite" in first
    assert "That makes 2 of the last 3 steps, and training.skip_nonfinite allows 1" in first
    assert len(list((two / "budget" / "nonfinite").iterdir())) == 2


# ---- copies that differ


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("flip-whole", "rank 0 (HOST) or 1 (HOST)"),  # of two nobody can tell which
        ("flip-rows", "rank 0 (HOST) or 1 (HOST)"),
        ("flip-data", "rank 3 (HOST)"),
        ("flip-tensor", "rank 3 (HOST)"),  # of two each time, but once among tensor ranks, once among data ranks
        ("flip-parts", "rank 1 (HOST) or 3 (HOST)"),
    ],
)
def test_one_bit_that_differs_between_copies_ends_the_run_and_is_named(
    request: pytest.FixtureRequest, name: str, named: str
) -> None:
    folder: Path = request.getfixturevalue("two" if name in ("flip-whole", "flip-rows") else "four")
    errors = {rank["error"] for rank in found(folder, name)}
    assert len(errors) == 1
    (error,) = errors
    host = error.split("(")[1].split(")")[0]
    assert (
        f"at step {COMPARED} copies that should be equal differ: norm.scale on {named.replace('HOST', host)}. " in error
    )
    assert not (folder / name / "checkpoints" / f"step-{COMPARED:08d}").exists()
    assert (folder / name / "checkpoints" / f"step-{COMPARED - 2:08d}").exists()


def test_a_checksum_sees_every_bit_and_every_exchange() -> None:
    values = torch.randn(5, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensor = values.to(dtype)
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        sums = {int(checksum(tensor))}
        for bit in range(8 * tensor.element_size()):
            changed = tensor.clone()
            flat = changed.view(integers).flatten()
            flat[11] ^= torch.tensor(1 << bit if bit < 8 * tensor.element_size() - 1 else -(1 << bit), dtype=integers)
            sums.add(int(checksum(changed)))
        assert len(sums) == 1 + 8 * tensor.element_size()
    assert checksum(values) == checksum(values.clone()) != checksum(values.flip(0))
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    nan = torch.tensor([torch.nan])
    assert checksum(nan) == checksum(nan.clone())


def test_the_odd_one_is_the_one_that_most_disagree_with() -> None:
    assert _odd({0: 5, 1: 5, 2: 7, 3: 5}) == {2}
    assert _odd({4: 5, 6: 7}) == {4, 6}
    assert _odd({0: 1, 1: 2, 2: 2, 3: 1}) == {0, 1, 2, 3}


# ---- slow ranks


@pytest.mark.parametrize(("name", "rank", "waits"), [("slow-forward", 2, False), ("slow-data", 1, True)])
def test_a_slow_rank_is_named_though_all_ranks_wait_for_it(four: Path, name: str, rank: int, waits: bool) -> None:
    ranks, ratios = figures(four / name, "slowest_rank"), figures(four / name, "slowest_rank_ratio")
    assert ranks[STEPS] == rank and ratios[STEPS] > 1.3
    assert (figures(four / name, "data_wait")[STEPS] > 0.1) == waits
    console = (four / "console.txt").read_text().split(f"{name} starts")[1].split("finished")[0]
    assert [line.split(" (")[0] for line in console.splitlines() if "is slow:" in line] == [
        f"step {step}: rank {rank}"
        for step in (4, STEPS)  # step 1 warms up, and one window is none yet
    ]


def test_a_rank_is_late_by_a_ratio_and_by_time() -> None:
    assert late_rank([(1.0, 0.0)], 1, 1.3) is None
    assert late_rank([(1.0, 0.0), (1.2, 0.0), (1.0, 0.0)], 2, 1.3) is None
    assert late_rank([(0.01, 0.0), (0.04, 0.0)], 1, 1.3) is None  # four times as long, and nobody would notice
    assert late_rank([(1.0, 0.0), (1.4, 0.0), (1.0, 0.0)], 10, 1.3) is None  # 40 ms per step
    assert late_rank([(1.0, 0.0), (1.4, 0.0), (1.0, 0.0)], 5, 1.3) == 1


def test_the_slowest_is_measured_against_the_others() -> None:
    assert slowest([(1.0, 0.0)]) == {}
    assert slowest([(1.0, 0.0), (3.0, 2.0)]) == {"slowest_rank": 1, "slowest_rank_ratio": 3.0}
    assert slowest([(2.0, 0.0), (1.0, 0.0), (8.0, 0.0), (4.0, 0.0)]) == {"slowest_rank": 2, "slowest_rank_ratio": 4.0}
