"""What each process of `benchmark parity` does: the same steps as one process, and how far apart they are."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STAGES = [0, 1, 2, 3]
ALONE = {"tensor": 1, "sequence": 1, "data": 1, "sequence_parallel": False, "wave": 1}
STEPS, RATE, ROWS, LENGTH, CLIP, VOCABULARY = 3, 1e-3, 8, 16, 0.5, 200  # padded to 256: split, one share has both


def plan_of(block: str, stage: int, layout: dict[str, Any], dtype: str) -> Any:
    """block: "mag", or with another paper's rule "mag-gated_deltanet"."""
    from titans_train.config import RunConfig
    from titans_train.plan import make_plan

    block, _, rule = block.partition("-")
    micro, pieces = ROWS // 2 // layout["data"], 1 if rule else 2
    wave = 1 if block == "mac" and stage == 3 else layout["wave"]
    config = {
        "run": {"name": f"parity-{block}{rule}-{stage}", "dtype": dtype},
        "model": {
            "block": block, "layers": 2, "width": 32, "heads": 4, "vocabulary": VOCABULARY, "initializer_std": 0.1,
        },
        "attention": {"window": 6, "persistent_tokens": 3} | ({"segment": 4} if block == "mac" else {}),
        "parallel": {
            "zero_stage": stage, "tensor": layout["tensor"], "sequence_parallel": layout["sequence_parallel"],
            "sequence": layout["sequence"], "pieces": pieces if micro > 1 else 1, "wave": wave,
        },
        "data": {"path": "unused"},
        "training": {"steps": STEPS, "sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": micro},
        # eps: entries whose gradient is rounding alone would move by the whole rate, either way
        "optimizer": {"gradient_clip": CLIP, "eps": 1e-6},
    }  # fmt: skip
    if block != "transformer":
        config["memory"] = {"chunk_size": 4} | ({"rule": rule} if rule else {"expansion": 2})
    return make_plan(RunConfig.model_validate(config), layout["tensor"] * layout["sequence"] * layout["data"])


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ROWS, LENGTH] of a global batch; rows have labels at 20 to 90 % of their tokens, anywhere."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    share = torch.linspace(0.2, 0.9, ROWS)[:, None]
    labels[torch.rand(ROWS, LENGTH, generator=generator) >= share] = -100
    return tokens[:, :-1], labels


@cache
def reference(block: str) -> list[dict[str, Any]]:
    """Gradients, norm and parameters of each step in fp32, by plain autograd on the whole batch."""
    from titans_train.models import LanguageModel
    from titans_train.training.optimizer import make_optimizer

    plan = plan_of(block, 0, ALONE, "float32")
    torch.manual_seed(plan.config.run.seed)
    model = LanguageModel(plan.shape)
    optimizer = make_optimizer(model, plan.config)
    out = []
    for step in range(STEPS):
        tokens, labels = batch(step)
        optimizer.zero_grad()
        (model(tokens, labels=labels).loss_sum / (labels != -100).sum()).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
        out.append({"gradients": gradients, "norm": float(norm), "parameters": parameters})
    return out


def largest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest error of a gradient, of max(its norm, 1e-3 of the global norm)."""
    assert got.keys() == want.keys()
    whole = float(torch.stack([g.norm() for g in want.values()]).norm())
    return max(float((got[n].to(g.dtype) - g).norm()) / max(float(g.norm()), 1e-3 * whole) for n, g in want.items())


def compare(block: str, stage: int, mesh: Any, layout: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Errors of three steps against one process in fp32 (in bf16 of the first only: the next start elsewhere).

    gradient, norm: at the first step, where the parameters are the same. later: both at the next two, where AdamW has
    moved parameters apart wherever a gradient was near zero, by rounding that it divides by its own size.
    """
    from titans_train.data import Batch
    from titans_train.training.loop import build_engine
    from titans_train.training.step import own_share, train_step

    plan = plan_of(block, stage, layout, dtype)
    engine, want = build_engine(plan, mesh), reference(block)
    parts: Any = engine.model.parts
    errors = {"gradient": 0.0, "later": 0.0, "norm": 0.0, "parameter": 0.0}
    micro, share = plan.config.training.micro_batch_size, ROWS // mesh.data
    for step in range(STEPS if dtype == "float32" else 1):
        tokens, labels = batch(step)
        first = mesh.data_rank * share
        batches = [
            own_share(Batch(tokens[i : i + micro], labels[i : i + micro], None, []), parts)
            for i in range(first, first + share, micro)
        ]
        got: dict[str, Tensor] = {}
        train_step(engine, batches, RATE, lambda got=got: got.update((n, g.clone()) for n, g in engine.gradients()))  # type: ignore[misc]
        key = "later" if step else "gradient"
        errors[key] = max(errors[key], largest(got, want[step]["gradients"]))
        norm = abs(engine.gradient_norm() / want[step]["norm"] - 1)
        errors["later" if step else "norm"] = max(errors["later" if step else "norm"], norm)
        for name, value in engine.parameters():
            errors["parameter"] = max(errors["parameter"], float((value - want[step]["parameters"][name]).abs().max()))
    return {"block": block, "zero": stage, **layout, "kind": dtype, **errors}


def double_gradients(block: str, parts: Any, mesh: Any) -> dict[str, Tensor]:
    """Of a weighted sum of the logits, whole, by name, in float64, without an engine. Collective."""
    from titans_train.models import LanguageModel
    from titans_train.parallel import sum_over_data
    from titans_train.parallel.split import join_over_ranks

    torch.manual_seed(0)
    plan = plan_of(block, 0, ALONE, "float32")
    model = LanguageModel(plan.shape, parts).double()
    tokens, _ = batch(0)
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(ROWS, LENGTH, plan.shape.padded_vocabulary, generator=generator, dtype=torch.float64)
    weights[..., VOCABULARY:] = 0
    hidden, _ = model.hidden(model.parts.shard(tokens), None, None)
    logits = model.embedding(hidden, as_head=True)
    own = logits.shape[1]
    first = mesh.tensor_rank * own if parts is not None else 0
    weights = model.parts.shard(weights)[..., first : first + own].flatten(0, 1)
    (logits.masked_fill(weights == 0, 0) * weights).sum().backward()
    model.parts.finish()
    return {
        n: join_over_ranks(p, sum_over_data(p.grad, mesh) / mesh.data if parts is not None else p.grad, mesh)
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def compare_double(block: str, mesh: Any, layout: dict[str, Any]) -> dict[str, Any]:
    from titans_train.parallel import make_parts
    from titans_train.training.loop import shard_settings

    want = double_gradients(block, None, mesh)
    parts = make_parts(mesh, layout["sequence_parallel"], shard_settings(plan_of(block, 1, layout, "float32")))
    got = double_gradients(block, parts, mesh)
    return {"block": block, "zero": None, **layout, "kind": "float64", "gradient": largest(got, want)}


def work(job: Path) -> None:
    """Reads what to compare from the file, and writes the rows to it."""
    from titans_train.parallel import mesh_of, process_group

    wanted, rows = json.loads(job.read_text()), []
    with process_group() as whole:
        for layout in wanted["layouts"]:
            with mesh_of(layout["tensor"], layout["sequence"]) as mesh:
                for block in wanted["blocks"]:
                    for kind in wanted["kinds"]:
                        if kind == "float64":
                            rows += [compare_double(block, mesh, layout)] if mesh.model > 1 else []
                            continue
                        stages = [s for s in wanted["stages"] if s or kind == "float32"]
                        rows += [compare(block, stage, mesh, layout, kind) for stage in stages]
        if whole.is_first:
            job.write_text(json.dumps(rows))
