"""Checkpoints: written beside and published whole, failures harm nothing, damage is seen and set aside by all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.corpus import prepare_folder
from tests.torchrun import ROOT, torchrun
from titans_train.config.schema import Checkpoint as Settings
from titans_train.errors import UserError
from titans_train.models.stored import build
from titans_train.parallel.pieces import KINDS, Piece
from titans_train.parallel.split import Split
from titans_train.shape import ModelShape
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.checkpoint_folder import candidates, check_disk, clear_leftovers, find_latest, prune
from titans_train.training.manifest import DamagedCheckpoint, read_manifest


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    prepared = prepare_folder(tmp_path_factory.mktemp("corpus"))
    done = torchrun(2, str(ROOT / "tests/training/saver_worker.py"), str(folder), str(prepared))
    assert done.returncode == 0, done.stderr[-5000:]
    (folder / "errors.txt").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def found(saved: Path) -> dict[str, Any]:
    return json.loads((saved / "found.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "kept", tmp_path / "run"))


def test_a_save_is_published_between_steps_without_waiting_for_it(found: dict[str, Any]) -> None:
    assert found["steps until published"] >= 2  # one that sees the parts written, one that sees the whole published


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_harms_nothing_and_keeps_nobody_waiting(found: dict[str, Any], rank: int) -> None:
    message, newest = found[f"failed on {rank}"]
    assert f"step {2 + rank} could not be written" in message and newest == 1
    assert "File too large" in found["said"][rank] and "the one of step 1 is untouched" in found["said"][rank]
    assert len(found["said"]) == 2 and found["saved"] == 7  # later saves work


def test_the_last_the_every_nth_and_the_best_checkpoints_stay(run: Path) -> None:
    """A validation loss that is not finite counts as none."""
    assert [path.name for path in candidates(run)] == ["step-00000007", "step-00000006", "step-00000004"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000007"
    assert [read_manifest(path)["validation_loss"] for path in candidates(run)] == [2.5, None, 1.0]
    prune(run, Settings(keep=1, keep_best=1))
    assert [path.name for path in candidates(run)] == ["step-00000007", "step-00000004"]
    prune(run, Settings(keep=1, keep_every=3))
    assert [path.name for path in candidates(run)] == ["step-00000007"]
    assert find_latest(run) == candidates(run)[0]


def test_all_ranks_set_a_damaged_checkpoint_aside_and_use_the_one_before(saved: Path, found: dict[str, Any]) -> None:
    """A bit flipped in the second rank's file, the first rank's cut, the two swapped: one after the other."""
    assert found["newest"][:2] == [6, 4]
    assert "every checkpoint" in found["newest"][2] and "restore one" in found["newest"][2]
    errors = (saved / "errors.txt").read_text()
    for step, damage in (
        (7, "rank-00001.safetensors is damaged: sha256"),
        (6, "1,000 bytes, expected"),
        (4, "damaged"),
    ):
        line = next(line for line in errors.splitlines() if f"set aside as step-{step:08d}.damaged" in line)
        assert damage in line
    assert errors.count("set aside as") == 3
    aside = sorted(path.name for path in (saved / "run" / "checkpoints").glob("step-*.damaged"))
    assert aside == [f"step-{step:08d}.damaged" for step in (4, 6, 7)]


def test_a_checkpoint_with_another_shape_is_refused_before_anything_is_set(found: dict[str, Any]) -> None:
    assert "other parameters than this version's model, such as embedding.weight" in found["reshaped"]
    assert found["untouched"] is True


def test_a_byte_changed_anywhere_is_seen(run: Path) -> None:
    newest = candidates(run)[0]
    assert newest.name == "step-00000007"
    for file in sorted(newest.iterdir()):
        content = file.read_bytes()
        for place in {0, 7, 8, 100, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}:
            changed = bytearray(content)
            changed[place] ^= 4
            file.write_bytes(changed)
            with pytest.raises(DamagedCheckpoint, match=file.name):
                Checkpoint.open(newest)
        file.write_bytes(content[:-1])
        with pytest.raises(DamagedCheckpoint, match=file.name):
            Checkpoint.open(newest)
        file.unlink()
        with pytest.raises(DamagedCheckpoint, match=file.name):
            Checkpoint.open(newest)
        assert find_latest(run) == candidates(run)[1]  # the one before
        file.write_bytes(content)
    Checkpoint.open(newest)


def test_what_a_killed_save_or_removal_leaves_is_no_checkpoint_and_is_cleared(run: Path) -> None:
    newest = candidates(run)[0]
    for suffix in (".tmp", ".removed"):
        shutil.copytree(newest, newest.with_name(f"step-00000099{suffix}"))
    assert find_latest(run) == newest
    clear_leftovers(run)
    assert sorted(p.name for p in newest.parent.iterdir()) == ["latest", *sorted(p.name for p in candidates(run))]


def test_pieces_are_read_however_they_were_cut(run: Path) -> None:
    checkpoint = Checkpoint.open(candidates(run)[0])
    name = next(
        n for n in checkpoint.names() if len(checkpoint.shape_of(n)) == 2 and checkpoint.shape_of(n)[0] % 4 == 0
    )
    for kind in KINDS:
        whole = checkpoint.tensor(kind, name)
        half = whole.shape[0] // 2
        for split in (None, Split(0, 2), Split(0, 2, (half, half))):
            for part in range(1 if split is None else 2):
                share = (whole if split is None else split.share(whole, part)).reshape(-1)
                for start, count in ((0, len(share)), (3, 11), (len(share) - 1, 1)):
                    read = checkpoint.read(kind, Piece(name, part, split, start, count))
                    assert torch.equal(read, share[start : start + count])


def test_the_model_of_a_checkpoint_loads_alone(run: Path) -> None:
    checkpoint = Checkpoint.open(candidates(run)[0])
    model = build(ModelShape.from_dict(checkpoint.manifest["shape"]), checkpoint)
    assert checkpoint.step == 7 and not model.training
    assert all(torch.equal(p, checkpoint.tensor("parameters", n)) for n, p in model.named_parameters())
    assert checkpoint.manifest["tokenizer"]["kind"] == "bytes"
    assert checkpoint.manifest["layout"] == {"tensor": 1, "sequence": 1, "data": 2, "zero_stage": 1}


def test_a_disk_that_is_too_small_is_named_with_both_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs 1,048,576,000,000 MiB and the disk of .* MiB free"):
        check_disk(tmp_path / "runs" / "not yet there", 2**20 * 1_048_576_000_000)
    assert list(tmp_path.iterdir()) == []
