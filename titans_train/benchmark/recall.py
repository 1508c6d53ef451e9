"""`benchmark recall`: associative recall with the memory on, and the same model with theta forced to 0.

Sequences show key-value pairs, then fillers, then the keys again; only what was written into the memory can answer,
since the gap is longer than any convolution. Accuracy on unseen sequences, chance being 1 / values.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.config import load_config
from titans_train.data import SyntheticDataset, TokenDataset, open_dataset
from titans_train.data.cursor import Cursor
from titans_train.data.sample import IGNORE
from titans_train.evaluation.perplexity import evaluate
from titans_train.evaluation.scoring import Scorer
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh, process_group
from titans_train.plan import Plan, make_plan
from titans_train.training.optimizer import learning_rate, make_optimizer

EVALUATED = 128  # unseen sequences per point


def steps(dataset: TokenDataset | SyntheticDataset, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(plan.config.training.steps):
        samples = [dataset.sequence(n) for n in Cursor.constant(plan.config.training.global_batch_size).batch(step)]
        yield torch.stack([s.tokens for s in samples]), torch.stack([s.labels for s in samples])


def curve(plan: Plan, mesh: Mesh, every: int, enough: float) -> list[dict[str, float]]:
    """Accuracy on unseen sequences every few steps; ends early at `enough`."""
    torch.manual_seed(plan.config.run.seed)
    model = LanguageModel(plan.shape)
    scorer = Scorer(model, mesh, plan.config.training.micro_batch_size)
    optimizer = make_optimizer(model, plan.config)
    held_out = open_dataset(plan.config, "validation")
    points: list[dict[str, float]] = []
    started = time.process_time()
    for step, (tokens, labels) in enumerate(steps(open_dataset(plan.config, "train"), plan)):
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.config.optimizer.gradient_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, plan.config)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == plan.config.training.steps:
            accuracy = evaluate(scorer, held_out, EVALUATED)["accuracy"]
            points.append({"step": step + 1, "loss": float(loss.detach()), "accuracy": accuracy})
            seconds = time.process_time() - started
            print(f"step {step + 1}: accuracy {accuracy:.3f}, {seconds:.0f} CPU-s", flush=True)
            if accuracy >= enough:
                break
    return points


def plot(curves: dict[str, list[dict[str, float]]], chance: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in curves.items():
        axes.plot([p["step"] for p in points], [p["accuracy"] for p in points], marker=".", label=name)
    axes.axhline(chance, color="grey", linestyle=":", label=f"chance, {chance:.1%}")
    axes.set(xlabel="optimiser steps", ylabel="accuracy on unseen sequences", ylim=(0, 1), title="Associative recall")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark recall", description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/recall.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--enough", type=float, default=0.99, help="stop at this accuracy")
    parser.add_argument("--off-steps", type=int, help="steps of the run with theta = 0 (default: as many)")
    parser.add_argument("--json", type=Path, help="file for both curves")
    parser.add_argument("--picture", type=Path, help="PNG with both curves")
    args = parser.parse_intermixed_args(argv)
    torch.set_num_threads(1)
    curves: dict[str, list[dict[str, float]]] = {}
    plan: Any = None
    for name, write in (("memory on", "true"), ("theta = 0", "false")):
        settings = [*args.overrides, f"memory.write={write}"]
        if args.off_steps and write == "false":
            settings = [s for s in settings if not s.startswith("training.steps=")]
            settings.append(f"training.steps={args.off_steps}")
        plan = make_plan(load_config(args.config, settings))
        with process_group() as mesh:
            curves[name] = curve(plan, mesh, args.every, args.enough)
    chance = 1 / plan.config.data.recall.values
    if args.json:
        about = {"config": args.config, "overrides": args.overrides, "chance": chance, "torch": torch.__version__}
        args.json.write_text(json.dumps({"about": about, "curves": curves}, indent=1) + "\n")
    if args.picture:
        plot(curves, chance, args.picture)
    return 0
