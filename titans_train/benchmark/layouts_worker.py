"""What each process of `benchmark layouts` does: counts messages and tensors of one layout after the other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

WIDTH, LAYERS, LENGTH, MICRO, VOCABULARY = 256, 2, 256, 2, 2000


def plan_of(layout: dict[str, Any]) -> Any:
    from titans_train.config import RunConfig
    from titans_train.plan import make_plan

    block = layout["block"]
    config: dict[str, Any] = {
        "run": {"name": "layouts", "dtype": layout["dtype"]},
        "model": {"block": block, "layers": LAYERS, "width": WIDTH, "heads": 4, "vocabulary": VOCABULARY},
        "memory": {"chunk_size": 32},
        "attention": {"window": 64, "persistent_tokens": 4} | ({"segment": 64} if block == "mac" else {}),
        "parallel": {
            "zero_stage": layout["zero"], "tensor": layout["tensor"], "sequence_parallel": layout["sequence_parallel"],
        },
        "data": {"path": "unused"},
        "training": {
            "steps": 3, "sequence_length": LENGTH, "global_batch_size": 2 * MICRO * layout["data"],
            "micro_batch_size": MICRO, "activation_checkpointing": layout["checkpointing"],
        },
    }  # fmt: skip
    return make_plan(RunConfig.model_validate(config), layout["tensor"] * layout["data"])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, (MICRO, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


def count_messages(plan: Any, mesh: Any) -> dict[str, Any]:
    """Counted and planned, of one layer's forward and backward and of a micro-batch's whole model."""
    from titans_train.benchmark.messages import CountMessages
    from titans_train.models import LanguageModel
    from titans_train.parallel import make_parts
    from titans_train.parallel.split import split_of
    from titans_train.plan_messages import layer, step

    at, dtype = plan.placement, getattr(torch, plan.config.run.dtype)
    model = LanguageModel(plan.shape, make_parts(mesh, at.sequence_parallel)).to(dtype)
    model.activation_checkpointing = at.checkpointing
    tokens, labels = batch()
    x = torch.randn(int(at.stream_tokens), WIDTH, dtype=dtype, requires_grad=True)
    same = [p for p in model.parameters() if split_of(p) is None]
    counted = []
    for completed in (False, True):  # without, then with gradients of shared parameters
        for parameter in same:
            parameter.requires_grad_(completed)
        with CountMessages() as forward:
            y, _ = model.blocks[0](x, MICRO)
        with CountMessages() as backward:
            y.sum().backward()
        counted.append(backward.messages)
    shared = counted[1] - counted[0]
    with CountMessages() as everything:
        model(tokens, labels).loss_sum.backward()
    planned, whole = layer(plan.shape, at), step(plan.shape, replace(at, accumulation=1))

    def row(counted: Any, wanted: Any) -> dict[str, Any]:
        figures = [{"count": dict(m.count), "bytes": dict(m.bytes)} for m in (counted, wanted)]
        return {"text": str(counted), "counted": figures[0], "planned": figures[1]}

    return {
        "forward": row(forward.messages, planned["forward"]),
        "backward": row(counted[0], planned["backward"]),
        "shared": row(shared, planned["shared"]),
        "micro_batch": row(everything.messages, whole),
    }


def peak(plan: Any, mesh: Any) -> int:
    """Bytes of tensors at the peak of a second step of two micro-batches."""
    from titans_train.benchmark.tensor_memory import TensorMemory
    from titans_train.data import Batch
    from titans_train.training.loop import build_engine
    from titans_train.training.step import train_step

    one = Batch(*batch(), None, [])
    with TensorMemory() as memory:
        engine = build_engine(plan, mesh)
        for _ in range(2):
            memory.reset_peak()
            train_step(engine, [one, one], 1e-3)
    return memory.peak


def work(job: Path) -> None:
    """Reads layouts from the file, and writes their rows to it."""
    from titans_train.parallel import gather, mesh_of, process_group

    rows = []
    with process_group() as whole:
        for layout in json.loads(job.read_text())["layouts"]:
            with mesh_of(layout["tensor"]) as mesh:
                plan = plan_of(layout)
                messages = count_messages(plan, mesh) if mesh.tensor > 1 else {}
                most = max(gather(peak(plan, mesh)))
                rows.append({**layout, "messages": messages, "peak": most, "plan": plan.memory_bytes["total"]})
        if whole.is_first:
            job.write_text(json.dumps(rows))
