"""`benchmark parity`: training under ZeRO and several ranks against plain autograd in one process.

Every block x ZeRO stage x number of ranks, fp32, real processes: each parameter's gradient by name before clipping,
the gradient norm, and the parameters after three AdamW steps without warm-up. Two micro-batches per step, numbers of
valid tokens unequal between ranks and micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_train.shape import BLOCKS

GRADIENT_LIMIT = 1e-5  # of max(a gradient's norm, 1e-3 of the global norm)
STEPS, RATE, ROWS, LENGTH, CLIP = 3, 1e-3, 8, 16, 0.5


def plan_of(block: str, stage: int, ranks: int) -> Any:
    from titans_train.config import RunConfig
    from titans_train.plan import make_plan

    micro = ROWS // 2 // ranks
    config = {
        "run": {"name": f"parity-{block}-{stage}-{ranks}"},
        "model": {"block": block, "layers": 2, "width": 32, "heads": 2, "vocabulary": 40, "initializer_std": 0.1},
        "attention": {"window": 6, "persistent_tokens": 2} | ({"segment": 8} if block == "mac" else {}),
        "parallel": {"zero_stage": stage},
        "data": {"path": "unused"},
        "training": {"steps": STEPS, "sequence_length": LENGTH, "global_batch_size": ROWS, "micro_batch_size": micro},
        "optimizer": {"gradient_clip": CLIP},
    }
    if block != "transformer":
        config["memory"] = {"chunk_size": 4, "expansion": 2}
    return make_plan(RunConfig.model_validate(config), ranks)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels [ROWS, LENGTH] of a global batch; row r has labels for r + 3 of its tokens only."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, 40, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.arange(LENGTH) >= torch.arange(3, 3 + ROWS)[:, None]] = -100
    return tokens[:, :-1], labels


def reference(plan: Any) -> list[dict[str, Any]]:
    """Gradients, norm and parameters of each step, by plain autograd on the whole batch."""
    from titans_train.models import LanguageModel
    from titans_train.training.optimizer import make_optimizer

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


def compare(block: str, stage: int, mesh: Any) -> dict[str, Any]:
    """One row of the table. Collective."""
    from titans_train.data import Batch
    from titans_train.training.loop import build_engine
    from titans_train.training.step import train_step

    plan = plan_of(block, stage, mesh.world_size)
    engine, want = build_engine(plan), reference(plan)
    errors = {"gradient": 0.0, "norm": 0.0, "parameter": 0.0}
    micro, share = plan.config.training.micro_batch_size, ROWS // mesh.data
    for step in range(STEPS):
        tokens, labels = batch(step)
        first = mesh.data_rank * share
        spans = [slice(first + i, first + i + micro) for i in range(0, share, micro)]
        got: dict[str, Tensor] = {}
        batches = [Batch(tokens[s], labels[s], None, []) for s in spans]
        train_step(engine, batches, RATE, lambda got=got: got.update((n, g.clone()) for n, g in engine.gradients()))  # type: ignore[misc]
        assert got.keys() == want[step]["gradients"].keys()
        for name, gradient in want[step]["gradients"].items():
            scale = max(float(gradient.norm()), 1e-3 * want[step]["norm"])
            errors["gradient"] = max(errors["gradient"], float((got[name] - gradient).norm()) / scale)
        errors["norm"] = max(errors["norm"], abs(engine.gradient_norm() / want[step]["norm"] - 1))
        for name, value in engine.parameters():
            errors["parameter"] = max(errors["parameter"], float((value - want[step]["parameters"][name]).abs().max()))
    return {"block": block, "zero": stage, "ranks": mesh.world_size, **errors}


def worker(blocks: list[str], stages: list[int], path: Path) -> None:
    from titans_train.parallel import process_group

    with process_group() as mesh:
        rows = [compare(block, stage, mesh) for block in blocks for stage in stages]
        if mesh.is_first:
            path.write_text(json.dumps(rows))


def run(blocks: list[str], stages: list[int], ranks: int, path: Path) -> list[dict[str, Any]]:
    """Starts `ranks` processes and returns their table."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "titans_train", "benchmark", "parity", "--worker", str(path),
        "--blocks", *blocks, "--stages", *map(str, stages),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"parity on {ranks} ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return list(json.loads(path.read_text()))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark parity", description=__doc__)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--json", type=Path, help="file for the table")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.blocks, args.stages, args.worker)
        return 0
    import tempfile

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in args.ranks:
            rows += run(args.blocks, args.stages, ranks, Path(folder) / f"{ranks}.json")
    print("| block | ZeRO | ranks | gradient | norm | parameters after 3 steps |\n|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['block']} | {r['zero']} | {r['ranks']} "
            f"| {r['gradient']:.1e} | {r['norm']:.1e} | {r['parameter']:.1e} |"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(r["gradient"] <= GRADIENT_LIMIT for r in rows) else 1
