"""The plan's numbers are those of the model that is built and of the arithmetic that is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.config.samples import load
from tests.models.shapes import tiny
from titans_train import plan_counts
from titans_train.benchmark.counts import baddbmm_flops
from titans_train.config import ConfigError
from titans_train.memory import MemoryState, memory_scan
from titans_train.memory.peers.scan import linear_scan
from titans_train.models.language_model import LanguageModel
from titans_train.plan import PlanError, human_bytes, make_plan, resolve_shape
from titans_train.shape import BLOCKS, PEERS, ModelShape

OPTIONS: list[dict[str, Any]] = [
    {},
    {"tied_head": False},
    {"attention": {"persistent_tokens": 0}},
    {"memory": {"depth": 1}},
    {"memory": {"depth": 4, "residual_norm": False, "convolution": 1}},
    {"memory": {"momentum": False, "forgetting": False}},
    {"memory": {"gate": "both"}, "attention": {"residual": False}},
    {"memory": {"momentum": False, "forgetting": False, "write": False}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_the_plan_counts_the_parameters_of_the_built_model(block: str, options: dict[str, Any]) -> None:
    shape = tiny(block, **options)
    model = LanguageModel(shape)
    assert sum(plan_counts.parameters(shape).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rule", PEERS)
@pytest.mark.parametrize("block", ["lmm", "mag", "mal"])
def test_the_plan_counts_the_parameters_of_other_papers_rules(block: str, rule: str) -> None:
    shape = tiny(f"{block}-{rule}")
    assert sum(plan_counts.parameters(shape).values()) == sum(p.numel() for p in LanguageModel(shape).parameters())


@pytest.mark.parametrize("rule", PEERS)
@pytest.mark.parametrize("chunk", [4, 16])
def test_flops_of_other_papers_rules_are_those_of_their_products(rule: str, chunk: int) -> None:
    """The triangular system counts as a product with half a matrix; torch does not count it."""
    shape = tiny(f"lmm-{rule}", memory={"chunk_size": chunk})
    length = 4 * chunk
    q, k, v, a = torch.randn(4, 1, shape.heads, length, shape.head_dim)
    decay = -torch.rand(k.shape if rule == "rwkv7" else k.shape[:3])
    pair = (None, None) if rule == "mamba2" else (a, -a)
    state = torch.zeros(1, shape.heads, shape.head_dim, shape.head_dim)
    counted = counted_flops(lambda: linear_scan(q, k, v, decay, *pair, state, chunk_size=chunk))
    system = 0 if rule == "mamba2" else chunk * 2 * shape.head_dim * shape.heads * length
    assert counted + system == pytest.approx(plan_counts.peer_forward_flops(shape, chunk) * length)


@pytest.mark.parametrize("block", BLOCKS)
def test_each_part_counts_the_parameters_of_its_modules(block: str) -> None:
    shape = tiny(block, tied_head=False)
    model, parts = LanguageModel(shape), plan_counts.parameters(shape)

    def total(*words: str) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if any(w in n for w in words))

    assert parts["embedding"] == total("embedding.")
    assert parts["head"] == sum(p.numel() for n, p in model.named_parameters() if n.startswith("head."))
    assert parts["feed_forward"] == total("feed_forward.")
    assert parts["persistent"] == total("persistent.")


def counted_flops(call: Any) -> int:
    """FLOPs of the matrix products that `call()` runs, as torch counts them, without those of fused attention."""
    aten = torch.ops.aten
    fused = aten._scaled_dot_product_flash_attention_for_cpu  # counted with the masked half, so left out
    mapping = {aten.baddbmm_: baddbmm_flops, fused: lambda *shapes, **_: 0}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as c:
        call()
    return int(c.get_total_flops())


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("to", ["zero", "start"])
def test_the_scan_does_the_flops_of_the_formula(to: str, depth: int, momentum: bool) -> None:
    shape = tiny("lmm", memory={"depth": depth, "momentum": momentum, "chunk_size": 4, "forget_to": to})
    batch, length = 2, 12
    rows = (batch, shape.heads, length)
    q, k, v = (torch.randn(*rows, shape.head_dim) for _ in range(3))
    weights = tuple(torch.randn(1, shape.heads, i, o) for i, o in plan_counts.memory_layers(shape))
    gate = torch.rand(rows)
    state = MemoryState.start(weights, momentum)
    gates, base = (gate, gate if momentum else None, gate), None if to == "zero" else weights
    counted = counted_flops(lambda: memory_scan(q, k, v, *gates, state, chunk_size=4, base=base))
    assert counted == batch * length * plan_counts.scan_forward_flops(shape, length)


def test_two_layers_cost_what_the_design_says() -> None:
    shape = tiny("lmm", memory={"chunk_size": 4, "forget_to": "zero"})
    d, h, b = shape.head_dim, 12, 4
    assert plan_counts.scan_forward_flops(shape, 64) == shape.heads * (22 * d * h + 4 * b * (d + h))


def test_a_large_chunk_costs_what_its_parts_do() -> None:
    of = [plan_counts.scan_forward_flops(tiny("lmm", memory={"chunk_size": c}), 1024) for c in (64, 256, 96, 48)]
    assert of[0] == of[1] and of[2] == of[3]


def matmul_flops(shape: ModelShape, length: int) -> float:
    """The plan's forward FLOPs without attention scores and elementwise weights."""
    parts = plan_counts.flops_per_token(shape, length)
    elementwise = 0
    if shape.memory is not None:
        taps = shape.memory.convolution if shape.memory.convolution > 1 else 0
        elementwise += (4 if shape.block == "mac" else 3) * taps * shape.width
        elementwise += shape.heads * (
            shape.memory.forgetting + shape.memory.momentum + shape.memory.write
        )  # gate biases
        elementwise += {"lmm": 1, "mal": 1, "mag": 2, "mac": 3}[shape.block] * shape.width  # scales of head norms
    return (sum(parts.values()) - parts["attention_scores"]) / 3 - 2 * shape.layers * elementwise


@pytest.mark.parametrize(("block", "residual"), [*((block, True) for block in BLOCKS), ("mac", False)])
def test_the_forward_does_the_flops_of_the_formula(block: str, residual: bool) -> None:
    plain = {"kernels": "plain"}  # torch does not see into the compiled scan
    shape = tiny(block, memory=plain, attention={"persistent_tokens": 0, "window": None, "residual": residual})
    model, length = LanguageModel(shape), 16
    counted = counted_flops(lambda: model(torch.zeros(1, length, dtype=torch.int64)))
    assert counted / length == pytest.approx(matmul_flops(shape, length), rel=1e-12)


@pytest.mark.parametrize(("window", "length"), [(None, 10), (6, 10), (6, 4), (1, 10)])
def test_attention_keys_are_those_that_a_mask_shows(window: int | None, length: int) -> None:
    shape = tiny("mag", attention={"window": window})
    index = torch.arange(length)
    distance = index[:, None] - index
    seen = (distance >= 0) & (distance < (window or length))
    assert plan_counts.attention_keys(shape, length) == pytest.approx(seen.sum().item() / length + 3)


def test_mac_sees_its_segment_twice() -> None:
    shape = tiny("mac")  # segment 8, 3 persistent tokens
    assert plan_counts.attention_keys(shape, 16) == 3 + 2 * sum(range(1, 9)) / 8


def test_the_batch_is_shared_by_ranks_and_micro_batches(tmp_path: Path) -> None:
    plan = make_plan(load(tmp_path, "optimizer.warmup_steps=3"), world_size=2)
    assert (plan.world_size, plan.data_parallel, plan.accumulation) == (2, 2, 2)
    assert (plan.tokens_per_step, plan.total_tokens, plan.warmup_steps) == (512, 5120, 3)
    assert plan.run_directory == Path("runs/test")
    assert make_plan(load(tmp_path)).accumulation == 4


def test_a_world_that_cannot_share_the_batch_is_a_plan_error_with_numbers_and_remedies(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"8 is not a multiple of 3 x 2 = 6\n.*use 6 or 12 .* or use 2 or 4") as raised:
        make_plan(load(tmp_path), world_size=3)
    assert isinstance(raised.value, ConfigError)


def test_a_config_changed_after_loading_is_checked_again(tmp_path: Path) -> None:
    config = load(tmp_path)
    broken = config.model_copy(update={"model": config.model.model_copy(update={"heads": 5})})
    with pytest.raises(PlanError, match="do not divide"):
        make_plan(broken)


@pytest.mark.parametrize("block", ["lmm", "mac", "mag", "mal"])
def test_a_memory_that_is_off_keeps_nothing_of_the_text(block: str, tmp_path: Path) -> None:
    """Neither does it forget its initial weights, at a rate that would depend on the text."""
    shape = resolve_shape(load(tmp_path, f"model.block={block}", "memory.write=false", "attention.window=8"))
    assert shape.memory is not None and not (shape.memory.forgetting or shape.memory.momentum)
    torch.manual_seed(0)
    model, tokens = LanguageModel(shape).double(), torch.randint(0, 250, (1, 160))
    other = tokens.clone()
    other[0, :4] = 251
    first, second = model(tokens).logits, model(other).logits
    assert not torch.equal(first[0, 3], second[0, 3])
    assert torch.equal(first[0, 128:], second[0, 128:])


@pytest.mark.parametrize(
    ("overrides", "theta_max", "store_every"),
    [
        (["memory.chunk_size=16"], 4 / 16, 16),
        (["memory.chunk_size=64"], 4 / 64, 16),
        (["memory.chunk_size=64", "memory.residual_norm=false"], 1 / 64, 16),
        (["memory.chunk_size=256", "training.sequence_length=256"], 4 / 256, 4),
        (["memory.chunk_size=4096", "training.sequence_length=4096"], 4 / 4096, 1),
        (["memory.theta_max=1", "memory.store_every=3"], 1.0, 3),
    ],
)
def test_defaults_of_the_memory_follow_the_chunk(
    tmp_path: Path, overrides: list[str], theta_max: float, store_every: int
) -> None:
    memory = resolve_shape(load(tmp_path, *overrides)).memory
    assert memory is not None
    assert (memory.theta_max, memory.store_every) == (theta_max, store_every)


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2752), (128, 352), (96, 256)])
def test_the_feed_forward_is_8_3_of_the_width_rounded_up_to_32(tmp_path: Path, width: int, hidden: int) -> None:
    assert resolve_shape(load(tmp_path, f"model.width={width}")).feed_forward == hidden
    assert resolve_shape(load(tmp_path, f"model.width={width}", "model.feed_forward=7")).feed_forward == 7


def test_a_shape_holds_only_what_its_block_uses(tmp_path: Path) -> None:
    shapes = {b: resolve_shape(load(tmp_path, f"model.block={b}")) for b in BLOCKS}
    assert [b for b, s in shapes.items() if s.memory is None] == ["transformer"]
    assert [b for b, s in shapes.items() if s.attention.window is not None] == ["transformer", "mag", "mal"]
    assert [b for b, s in shapes.items() if s.attention.segment is not None] == ["mac"]
    assert [b for b, s in shapes.items() if s.attention.persistent_tokens == 0] == ["transformer"]
    assert shapes["mac"] == ModelShape.from_dict(json.loads(json.dumps(shapes["mac"].to_dict())))


@pytest.mark.parametrize("block", BLOCKS)
def test_the_plan_is_json_and_readable_text(tmp_path: Path, block: str) -> None:
    plan = make_plan(load(tmp_path, f"model.block={block}"), world_size=2)
    data = json.loads(json.dumps(plan.to_dict(), allow_nan=False))
    assert data["parameters"]["total"] == plan.parameter_count
    assert data["flops_per_token"]["total"] == plan.flops_per_token
    assert data["memory_bytes_by_zero_stage"]["1"] == data["memory_bytes_per_rank"]
    assert data["checkpoint_bytes"] == 12 * plan.parameter_count
    text = plan.describe()
    assert all(s in text for s in (f"{plan.parameter_count:,}", "data 2 x sequence 1 x tensor 1", "*ZeRO 1", block))


def test_memory_parts_add_up_and_shrink_with_the_stage(tmp_path: Path) -> None:
    plan = make_plan(load(tmp_path), world_size=4)
    kept = ("parameters", "gradients", "master_weights", "optimizer")
    totals = [sum(plan.memory_by_stage[stage][part] for part in kept) for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    assert plan.memory_bytes["total"] == sum(n for part, n in plan.memory_bytes.items() if part != "total")


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3.0 TiB"), (1 << 52, "4096.0 TiB")]
)
def test_bytes_are_shown_in_a_fitting_unit(n: int, text: str) -> None:
    assert human_bytes(n) == text
