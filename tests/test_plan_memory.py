"""The plan's bytes: its rules, and what autograd keeps. tests/distributed/test_cost.py measures whole steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.shapes import tiny
from titans_train import plan_counts, plan_memory
from titans_train.models.language_model import LanguageModel
from titans_train.placement import Placement
from titans_train.plan_memory import ZERO_STAGES, ZeroSizes
from titans_train.shape import BLOCKS, ModelShape


def at(**changes: Any) -> Placement:
    one = Placement(
        tensor=1, replicas=1, sequence_parallel=False, item=4, sequences=1, length=256, accumulation=2,
        checkpointing=False,
    )  # fmt: skip
    return replace(one, **changes)


def by_stage(part: str, **changes: Any) -> list[int]:
    sizes = ZeroSizes(bucket=100, live=200)
    return [plan_memory.zero_bytes(1000, sizes, stage, at(replicas=4, **changes))[part] for stage in ZERO_STAGES]


def test_zero_stages_split_one_part_after_the_other() -> None:
    assert by_stage("optimizer", item=2) == [8000, 2000, 2000, 2000]
    assert by_stage("master_weights", item=2) == [4000, 1000, 1000, 1000]
    assert by_stage("gradients", item=2) == [2000, 2000, 500, 500]
    assert by_stage("parameters", item=2) == [2000, 2000, 2000, 500]
    assert by_stage("buffers", item=2) == [0, 200, 200, 600]


def test_float32_needs_no_master_weights_but_deepspeed_keeps_some() -> None:
    assert by_stage("master_weights") == [0, 1000, 1000, 1000]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("tensor", [2, 4])
def test_ranks_hold_an_equal_share_of_all_but_the_shared_parameters(block: str, tensor: int) -> None:
    shape = replace(tiny(block), heads=4, head_dim=4)
    whole, shared = sum(plan_counts.parameters(shape).values()), plan_counts.shared_parameters(shape)
    names = ("norm.scale", "persistent")
    same = [p for n, p in LanguageModel(shape).named_parameters() if any(w in n for w in names) and "head" not in n]
    same = [p for p in same if p.ndim == 1 or p.shape[0] == 3]
    assert shared == sum(p.numel() for p in same)
    assert plan_counts.parameters_per_rank(shape, tensor) == shared + (whole - shared) / tensor


def kept_shape(block: str) -> ModelShape:
    shape = replace(
        tiny(block, attention={"window": 64, "segment": 64}), width=64, heads=2, head_dim=32, feed_forward=192
    )
    if shape.memory is not None:
        shape = replace(shape, memory=replace(shape.memory, chunk_size=32, hidden=128, store_every=4))
    return shape


@pytest.mark.parametrize("block", BLOCKS)
def test_activations_and_states_are_within_7_percent_of_what_autograd_keeps(block: str) -> None:
    shape = kept_shape(block)
    model, tokens = LanguageModel(shape), torch.zeros(1, 256, dtype=torch.int64)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses apart

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(tokens, tokens).loss_sum
    assert loss is not None
    measured = sum(x.untyped_storage().nbytes() for x in kept.values())
    planned = plan_memory.activation_bytes(shape, at()) + plan_memory.scan_state_bytes(shape, at())
    assert planned == pytest.approx(measured, rel=0.07)


@pytest.mark.parametrize("item,parts", [(2, 4), (4, 8)])
def test_triton_s_kernels_recompute_the_states_before_all_parts_of_chunks(item: int, parts: int) -> None:
    """Parts of 64 tokens for heads of 64, of 32 in float32."""
    memory = {"chunk_size": 256, "hidden": 1024, "store_every": 4}

    def working(kernels: str) -> int:
        shape = tiny("lmm", memory={**memory, "kernels": kernels})
        shape = replace(shape, width=128, heads=2, head_dim=64, feed_forward=0)
        return plan_memory.working_bytes(shape, at(item=item, length=4096))

    state = 4 * 2 * (2 * 2 * 64 * 1024)
    assert working("triton") - working("plain") == 4 * (parts - 1) * state


def test_activation_checkpointing_saves_memory() -> None:
    shape = replace(tiny("mag"), layers=8)
    less = plan_memory.activation_bytes(shape, at(length=64, checkpointing=True))
    assert less < plan_memory.activation_bytes(shape, at(length=64)) / 2


@pytest.mark.parametrize("block", BLOCKS)
def test_sequence_parallelism_splits_the_residual_stream_too(block: str) -> None:
    shape = kept_shape(block)
    plain, shared = (plan_memory.layer_bytes(shape, at(tensor=2, sequence_parallel=s)) for s in (False, True))
    norms = 3 if block == "mal" else 2
    assert plain - shared == 4 * 256 * 2 * norms * 64 / 2
