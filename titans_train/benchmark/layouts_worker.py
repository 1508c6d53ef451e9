"""What each process of `benchmark layouts` does: counts messages and tensors of one layout after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from titans_train.benchmark.messages import CountMessages
from titans_train.benchmark.tensor_memory import TensorMemory
from titans_train.config import RunConfig
from titans_train.data import Batch
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh, gather, make_parts, mesh_of, process_group
from titans_train.parallel.split import split_of
from titans_train.plan import Plan, make_plan
from titans_train.plan_messages import Messages, across, layer, step
from titans_train.training.loop import build_engine, shard_settings
from titans_train.training.step import own_share, train_step

WIDTH, LAYERS, LENGTH, MICRO, VOCABULARY = 256, 2, 256, 2, 2000


def plan_of(layout: dict[str, Any]) -> Plan:
    block, _, rule = layout["block"].partition("-")
    config: dict[str, Any] = {
        "run": {"name": "layouts", "dtype": layout["dtype"]},
        "model": {"block": block, "layers": LAYERS, "width": WIDTH, "heads": 4, "vocabulary": VOCABULARY},
        # as on a GPU: the compiled scan of a CPU needs less
        "memory": {"chunk_size": 32, "kernels": "plain"} | ({"rule": rule} if rule else {})
        | ({"depth": 1, "residual_norm": False} if layout["linear"] else {}),
        "attention": {"window": 64, "persistent_tokens": 4} | ({"segment": 64} if block == "mac" else {}),
        "parallel": {
            "zero_stage": layout["zero"], "tensor": layout["tensor"], "sequence_parallel": layout["sequence_parallel"],
            "sequence": layout["sequence"], "wave": layout["wave"], "scan": "affine" if layout["linear"] else None,
        },
        "data": {"path": "unused"},
        "training": {
            "steps": 3, "sequence_length": LENGTH, "global_batch_size": 2 * MICRO * layout["data"],
            "micro_batch_size": MICRO, "activation_checkpointing": layout["checkpointing"],
        },
    }  # fmt: skip
    return make_plan(RunConfig.model_validate(config), layout["tensor"] * layout["sequence"] * layout["data"])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def count_messages(plan: Plan, mesh: Mesh) -> dict[str, Any]:
    """Counted and planned, of one layer's forward and backward and of a micro-batch's whole model, on this rank."""
    at, dtype = plan.placement, getattr(torch, plan.config.run.dtype)
    model = LanguageModel(plan.shape, make_parts(mesh, at.sequence_parallel, shard_settings(plan))).to(dtype)
    model.activation_checkpointing = at.checkpointing
    tokens, labels = (model.parts.shard(x) for x in batch())
    x = torch.randn(int(at.stream_tokens), WIDTH, dtype=dtype, requires_grad=True)
    same = [p for p in model.parameters() if split_of(p) is None]
    shared = mesh.tensor > 1  # parameters that tensor-parallel ranks hold alike
    counted = []
    for completed in (False, True) if shared else (True, True):  # without, then with their gradients
        for parameter in same:
            parameter.requires_grad_(completed)
        with CountMessages() as forward:
            y, _ = model.blocks[0](x, MICRO)
        with CountMessages() as backward:
            y.sum().backward()
            model.parts.finish()
        counted.append(backward.messages)
    with CountMessages() as everything:
        model(tokens, labels).loss_sum.backward()
        model.parts.finish()
    one, shards = layer(plan.shape, at), across(plan.shape, at, mesh.sequence_rank)
    whole = step(plan.shape, replace(at, accumulation=1), mesh.sequence_rank)

    def row(counted: Messages, wanted: Messages) -> dict[str, Any]:
        figures = [{"count": dict(m.count), "bytes": dict(m.bytes)} for m in (counted, wanted)]
        return {"text": str(counted), "counted": figures[0], "planned": figures[1]}

    return {
        "forward": row(forward.messages, one["forward"] + shards["forward"]),
        "backward": row(counted[0], one["backward"] + shards["backward"]),
        "shared": row(counted[1] - counted[0], one["shared"]),
        "micro_batch": row(everything.messages, whole),
    }


def peak(plan: Plan, mesh: Mesh) -> int:
    """Bytes of tensors at the peak of a second step of two micro-batches."""
    one = Batch(*batch(), None, [])
    with TensorMemory() as memory:
        engine = build_engine(plan, mesh)
        for _ in range(2):
            memory.reset_peak()
            own = own_share(one, engine.model.parts)  # type: ignore[arg-type]
            train_step(engine, [own, own], 1e-3)
    return memory.peak


def work(job: Path) -> None:
    """Reads layouts from the file, and writes their rows to it."""
    rows = []
    with process_group() as whole:
        for layout in json.loads(job.read_text())["layouts"]:
            with mesh_of(layout["tensor"], layout["sequence"]) as mesh:
                plan = plan_of(layout)
                by_rank = gather(count_messages(plan, mesh) if mesh.model > 1 else {})
                wrong = [m for m in by_rank if any(part["counted"] != part["planned"] for part in m.values())]
                shown = by_rank[max(0, mesh.sequence - 2) * mesh.tensor]
                most = max(gather(peak(plan, mesh)))
                rows.append(
                    {**layout, "messages": (wrong or [shown])[0], "peak": most, "plan": plan.memory_bytes["total"]}
                )
        if whole.is_first:
            job.write_text(json.dumps(rows))
