"""Combinations that no run may have are refused, each with its remedy; the remedy is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.samples import load, problems, write
from titans_train.config import check_config

RECALL = ("model.block=lmm", "data.source=recall", "data.recall.gap=0", "data.recall.pairs=16")

# overrides that break the sample; the path reported; a part of the message; of the suggestion; overrides that mend it
CASES = [
    (["model.heads=5"], "model.heads", "do not divide model.width 32", "4 or 8", ["model.heads=4"]),
    (["model.heads=32"], "model.heads", "need it even", "16", ["model.heads=16"]),
    (["model.block=mac", "attention.segment=null"], "attention.segment", "mac", "128", ["attention.segment=64"]),
    (
        ["model.block=mac", "attention.segment=40"],
        "attention.segment",
        "not a multiple of memory.chunk_size 16",
        "32 or 48",
        ["attention.segment=32"],
    ),
    (
        ["model.block=mac", "training.sequence_length=80"],
        "training.sequence_length",
        "attention.segment 32",
        "64 or 96",
        ["training.sequence_length=96"],
    ),
    (["attention.window=null"], "attention.window", "block mag", "use 32", ["attention.window=32"]),
    (
        ["model.block=mal", "attention.window=65"],
        "attention.window",
        "training.sequence_length 64",
        "at most 64",
        ["attention.window=64"],
    ),
    (
        ["training.sequence_length=70"],
        "training.sequence_length",
        "memory.chunk_size 16",
        "64 or 80",
        ["training.sequence_length=80"],
    ),
    (
        ["model.block=lmm", "training.sequence_length=8"],
        "training.sequence_length",
        "memory.chunk_size 16",
        "use 16",
        ["training.sequence_length=16"],
    ),
    (["parallel.tensor=3"], "parallel.tensor", "cannot share model.heads 4", "2 or 4", ["parallel.tensor=2"]),
    (
        ["parallel.tensor=4", "model.feed_forward=90"],
        "model.feed_forward",
        "90 units cannot be shared evenly by parallel.tensor 4",
        "88 or 92",
        ["model.feed_forward=92"],
    ),
    (
        ["parallel.tensor=4", "model.vocabulary=258", "model.vocabulary_multiple=6"],
        "model.vocabulary_multiple",
        "258 rows cannot be shared evenly by parallel.tensor 4",
        "4 or 8",
        ["model.vocabulary_multiple=8"],
    ),
    (
        [
            "parallel.tensor=4",
            "parallel.sequence_parallel=true",
            "model.block=transformer",
            "attention.window=null",
            "training.sequence_length=65",
        ],
        "parallel.sequence_parallel",
        "2 x 65 tokens of a micro-batch",
        "64 or 68",
        ["training.sequence_length=68"],
    ),
    (
        [
            "parallel.tensor=4",
            "parallel.sequence_parallel=true",
            "model.block=lmm",
            "memory.chunk_size=15",
            "training.sequence_length=45",
            "training.micro_batch_size=1",
        ],
        "parallel.sequence_parallel",
        "1 x 45 tokens of a micro-batch",
        "use 60 for",
        ["training.sequence_length=60"],
    ),
    (
        ["parallel.sequence=4", "training.sequence_length=96"],
        "training.sequence_length",
        "4 equal shards of whole chunks of 16 tokens",
        "64 or 128",
        ["training.sequence_length=128"],
    ),
    (
        ["parallel.sequence=2", "model.block=mac", "training.sequence_length=96"],
        "training.sequence_length",
        "2 equal shards of whole segments of 32 tokens",
        "64 or 128",
        ["training.sequence_length=64"],
    ),
    (
        ["parallel.sequence=4", "model.block=transformer", "training.sequence_length=66"],
        "training.sequence_length",
        "4 equal shards of whole tokens",
        "64 or 68",
        ["training.sequence_length=68"],
    ),
    (
        ["parallel.sequence=4", "memory.convolution=20"],
        "parallel.sequence",
        "4 shards of 16 tokens are shorter than memory.convolution 20 - 1",
        "use 2",
        ["parallel.sequence=2"],
    ),
    (
        ["parallel.scan=affine"],
        "parallel.scan",
        "memory.depth is 2 and memory.residual_norm true",
        "wavefront",
        ["parallel.scan=wavefront"],
    ),
    (
        ["parallel.scan=affine", "model.block=mac", "memory.depth=1", "memory.residual_norm=false"],
        "parallel.scan",
        "block mac has no scan over a whole sequence",
        "null",
        ["parallel.scan=null"],
    ),
    (
        ["parallel.sequence=2", "parallel.pieces=9"],
        "parallel.pieces",
        "more than the 8 sequences x heads",
        "at most 8",
        ["parallel.pieces=8"],
    ),
    (
        ["parallel.sequence=2", "model.block=mac", "parallel.pieces=3"],
        "parallel.pieces",
        "more than the 2 sequences",
        "at most 2",
        ["parallel.pieces=2"],
    ),
    (
        ["parallel.sequence=2", "model.block=mac", "parallel.zero_stage=3", "parallel.wave=2"],
        "parallel.wave",
        "one micro-batch at a time",
        "use 1",
        ["parallel.wave=1"],
    ),
    (
        ["parallel.sequence_parallel=true"],
        "parallel.sequence_parallel",
        "parallel.tensor is 1",
        "false",
        ["parallel.sequence_parallel=false"],
    ),
    (
        ["run.dtype=bfloat16", "parallel.zero_stage=0"],
        "parallel.zero_stage",
        "bfloat16",
        "use 1",
        ["parallel.zero_stage=1"],
    ),
    (["data.path=null"], "data.path", "null, but data.source is shards", "data_prep", ["data.path=x"]),
    (["model.block=lmm", "data.source=recall"], "data.recall", "recall", "recall:", ["data.recall.gap=0"]),
    (
        [*RECALL, "data.recall.keys=8"],
        "data.recall.pairs",
        "data.recall.keys is 8",
        "at most 8",
        ["data.recall.keys=16"],
    ),
    (
        [*RECALL, "data.recall.values=8", "data.recall.spread=0.1"],
        "data.recall.pairs",
        "data.recall.values is 8",
        "data.recall.values 16",
        ["data.recall.values=16"],
    ),
    (
        [*RECALL[:2], "data.recall.pairs=16", "data.recall.gap=16"],
        "training.sequence_length",
        "too short",
        "at least 80",
        ["training.sequence_length=80"],
    ),
    (
        [*RECALL, "model.vocabulary=129"],
        "model.vocabulary",
        "129 is too small",
        "at least 130",
        ["model.vocabulary=130"],
    ),
    (
        ["training.carry_state=true", *RECALL],
        "training.carry_state",
        "data.source is recall",
        "use false",
        ["training.carry_state=false"],
    ),
    (
        ["training.carry_state=true", "model.block=transformer", "attention.window=null"],
        "attention.window",
        "would grow without limit",
        "use 32",
        ["attention.window=32"],
    ),
    (
        ["training.global_batch_size=9"],
        "training.global_batch_size",
        "micro_batch_size 2",
        "8 or 10",
        ["training.global_batch_size=10"],
    ),
    (
        ["memory.rule=deltanet", "model.block=mac"],
        "memory.rule",
        "deltanet, but block mac",
        "titans",
        ["memory.rule=titans"],
    ),
    (
        ["memory.rule=mamba2", "memory.write=false"],
        "memory.write",
        "mamba2, which always writes",
        "use true",
        ["memory.write=true"],
    ),
    (
        ["memory.rule=rwkv7", "memory.chunk_size=128", "training.sequence_length=128"],
        "memory.chunk_size",
        "128, but memory.rule is rwkv7",
        "at most 64",
        ["memory.chunk_size=64"],
    ),
    (
        ["memory.rule=deltanet", "memory.peer_kernels=fla"],
        "memory.peer_kernels",
        "heads are 8 wide",
        "use auto",
        ["memory.peer_kernels=auto"],
    ),
    (
        ["memory.kernels=triton", "memory.depth=3"],
        "memory.kernels",
        "a depth of at most 2; here it is 3",
        "use auto",
        ["memory.kernels=auto"],
    ),
    (
        ["memory.kernels=triton", "memory.chunk_size=122", "training.sequence_length=122", "run.dtype=float32"],
        "memory.kernels",
        "chunks of at most 32 tokens, or with a divisor from 16 to 32; here it is 122",
        "use auto",
        ["memory.chunk_size=61", "memory.kernels=plain"],
    ),
    (
        ["memory.kernels=triton", "memory.forget_to=start"],
        "memory.kernels",
        "forget to zero only",
        "use auto",
        ["memory.kernels=plain"],
    ),
    (
        ["memory.rule=deltanet", "parallel.sequence=2", "parallel.pieces=2"],
        "parallel.pieces",
        "2, but memory.rule is deltanet",
        "use 1",
        ["parallel.pieces=1"],
    ),
    (
        ["optimizer.warmup_steps=11"],
        "optimizer.warmup_steps",
        "training.steps 10",
        "at most 10",
        ["optimizer.warmup_steps=10"],
    ),
]


@pytest.mark.parametrize(
    ("broken", "path", "message", "suggestion", "mended"), CASES, ids=[f"{c[1]}-{c[0][0]}" for c in CASES]
)
def test_a_combination_is_refused_and_its_remedy_accepted(
    tmp_path: Path, broken: list[str], path: str, message: str, suggestion: str, mended: list[str]
) -> None:
    found = problems(write(tmp_path), *broken)
    assert set(found) == {path}
    assert message in found[path].message
    assert suggestion in found[path].suggestion
    changed = {o.partition("=")[0] for o in mended}
    load(tmp_path, *[o for o in broken if o.partition("=")[0] not in changed], *mended)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.block=transformer", "attention.window=null", "training.sequence_length=70"],
        ["model.block=transformer", "memory.depth=3"],
        ["model.block=lmm", "attention.window=4096"],
        ["model.block=lmm", "model.heads=32"],
        ["model.block=mac", "attention.window=4096"],
        ["data.packing=isolate"],
        ["training.carry_state=true", "model.block=transformer"],
        ["training.carry_state=true", "model.block=lmm", "attention.window=null"],
    ],
)
def test_settings_that_a_block_does_not_use_are_no_error(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("world_size", "message", "suggestion"),
    [
        (
            3,
            "8 sequences cannot be shared by 3 data-parallel ranks",
            "use 6 or 12 for training.global_batch_size, or use 2 or 4",
        ),
        (8, "8 x 2 = 16", "use 16 for training.global_batch_size, or use 4"),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused(
    tmp_path: Path, world_size: int, message: str, suggestion: str
) -> None:
    found = problems(write(tmp_path), world_size=world_size)
    assert message in found["training.global_batch_size"].message
    assert suggestion in found["training.global_batch_size"].suggestion


def test_a_world_that_does_not_hold_the_mesh_is_refused(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "parallel.tensor=2", world_size=3)
    assert "3 processes are not a multiple" in found["world size"].message
    assert "2 or 4" in found["world size"].suggestion


def test_no_processes_are_refused(tmp_path: Path) -> None:
    assert "at least 1" in problems(write(tmp_path), world_size=0)["world size"].message


def test_a_config_from_elsewhere_can_be_checked_too(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert check_config(config) == []
    training = config.training.model_copy(update={"sequence_length": 70})
    assert [p.path for p in check_config(config.model_copy(update={"training": training}))] == [
        "training.sequence_length"
    ]
