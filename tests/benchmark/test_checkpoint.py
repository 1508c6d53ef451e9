"""`benchmark checkpoint` runs small on real processes; its comparison, and what it feeds torch's checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.torchrun import torchrun
from titans_train.benchmark import main
from titans_train.benchmark.checkpoint import void
from titans_train.benchmark.checkpoint_dcp import Blocks, rectangles
from titans_train.benchmark.checkpoint_peers import MECHANISMS
from titans_train.parallel.pieces import Piece
from titans_train.parallel.split import Split


def test_every_mechanism_is_measured_and_gives_back_what_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--layouts", "2", "--width", "32", "--layers", "1", "--rounds", "1"]
    loops = ["--steps", "4", "--every", "2", "--loops", "1"]
    path = tmp_path / "checkpoint.json"
    assert main(["checkpoint", *sizes, *loops, "--folder", str(tmp_path), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    saves: dict[str, Any] = {row["mechanism"]: row for row in found["saves"]}
    assert list(saves) == list(MECHANISMS)
    for name, row in saves.items():
        assert row["difference"] == 0.0 and row["bytes"] > row["state"] > 0 and 0 < row["blocked"] <= row["complete"]
        assert row["difference_other"] == (None if name == "deepspeed" else 0.0)
    assert [name for name, row in saves.items() if not row["unpickles"]] == ["ours", "ours-synchronous", "whole"]
    without, synchronous, asynchronous = found["training"]
    modes = [row["mode"] for row in found["training"]]
    assert modes == ["none", "synchronous", "asynchronous"] and without["blocked"] is None and without["mean"] > 0
    assert synchronous["blocked"] >= synchronous["save"] > 0 and asynchronous["blocked"] > 0
    assert not [p for p in tmp_path.iterdir() if p.is_dir()], "checkpoints are left behind"
    printed = capsys.readouterr().out
    assert "| tensor 1 x data 2, ZeRO 1 | deepspeed |" in printed and "| asynchronous |" in printed


def test_the_comparison_notices_one_element_on_one_rank_and_another_step(tmp_path: Path) -> None:
    done = torchrun(2, "tests/benchmark/known_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["set"] == 0.0 and found["one element"] == pytest.approx(0.25)
    assert found["forgotten"] > 0.9 and found["another step"] == math.inf


@pytest.mark.parametrize(
    ("difference", "other", "is_void"),
    [(0.0, 0.0, False), (0.0, None, False), (1e-9, 0.0, True), (0.0, 1e-9, True), (math.inf, None, True)],
)
def test_a_row_with_any_difference_is_void(difference: float, other: float | None, is_void: bool) -> None:
    assert void({"difference": difference, "difference_other": other}) is is_void


@pytest.mark.parametrize(
    ("shape", "split"),
    [
        ((7,), None), ((6, 5), None), ((3, 4, 5), None), ((8, 3), Split(0, 2)), ((6, 8), Split(1, 2, (6, 2))),
        ((12, 3), Split(0, 2, (4, 8))), ((3, 8, 2), Split(1, 4)),
    ],
)  # fmt: skip
def test_blocks_put_every_element_of_any_piece_where_it_belongs(shape: tuple[int, ...], split: Split | None) -> None:
    whole = torch.arange(float(math.prod(shape))).view(shape)
    parts = 1 if split is None else split.parts
    size = whole.numel() // parts
    for cuts in ([0, size], [0, 1, size], [0, size // 3, size // 3 + 2, size]):
        found = torch.full(shape, -1.0)
        for part in range(parts):
            share = (whole if split is None else split.share(whole, part)).reshape(-1)
            for start, end in zip(cuts, cuts[1:], strict=False):
                piece = Piece("name", part, split, start, end - start)
                for at, block in Blocks(shape, piece, share[start:end]).tensors.items():
                    place = tuple(slice(o, o + n) for o, n in zip(at, block.shape, strict=True))
                    assert (found[place] == -1).all(), "two blocks overlap"
                    found[place] = block
        assert torch.equal(found, whole)


def test_a_range_is_as_few_rectangles_as_its_broken_rows_need() -> None:
    assert list(rectangles(5, 28, (4, 8))) == [((0, 5), (1, 3)), ((1, 0), (2, 8)), ((3, 0), (1, 4))]
    assert list(rectangles(0, 1, ())) == [((), ())]
