"""Do the defaults train? Every Titans block, 300 steps, one batch row a single repeated token.

With all gradients of a chunk at one anchor, equal keys are the worst case: their step sizes add up. The claim:
no NaN anywhere, and the other rows' loss ends below the unigram entropy of the text, in nats per byte.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_train.config import RunConfig
from titans_train.models import LanguageModel, recording
from titans_train.plan import make_plan

LAST = 20  # steps whose loss is averaged at the end


def standard_library_bytes(limit: int) -> Tensor:
    """The first `limit` bytes of the running Python's standard library, as int64."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= limit:
            break
    return torch.frombuffer(text[:limit], dtype=torch.uint8).long()


def unigram_entropy(text: Tensor) -> float:
    p = torch.bincount(text, minlength=256).double() / len(text)
    return float(-(p[p > 0] * p[p > 0].log()).sum())


def batches(text: Tensor, rows: int, length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels [rows, length]; row 0 is one repeated token, another in each batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(text) - length - 1, (rows,), generator=generator)
        block = torch.stack([text[s : s + length + 1] for s in starts.tolist()])
        block[0] = block[0, 0]
        yield block[:, :-1], block[:, 1:]


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / max(1, steps // 10))
    return peak * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def train(block: str, chunk: int, length: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run; returns its figures. A NaN ends it and is reported, not raised."""
    model_section = {"block": block, "layers": args.layers, "width": args.width, "heads": 4, "vocabulary": 264}
    config = RunConfig.model_validate(
        {
            "run": {"name": "stability"},
            "model": model_section,
            "memory": {"chunk_size": chunk},
            "attention": {"window": 64, "segment": max(chunk, 64)},
            "data": {"path": "unused"},
            "training": {"steps": args.steps, "sequence_length": length, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )
    torch.manual_seed(args.seed)
    model = LanguageModel(make_plan(config).shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    text = standard_library_bytes(4_000_000)
    source = batches(text, args.rows, length, args.seed)
    losses, norms, started = [], [], time.process_time()
    finite = True
    for step in range(args.steps):
        tokens, labels = next(source)
        logits = model(tokens).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)
        optimizer.zero_grad()
        each.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        optimizer.step()
        losses.append(float(each[1:].mean().detach()))
        norms.append(norm)
        finite = math.isfinite(losses[-1]) and math.isfinite(norm)
        if not finite:
            break
    with recording(model) as records, torch.no_grad():
        model(next(source)[0])
    parameters_finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    return {
        "block": block, "chunk_size": chunk, "length": length, "steps": len(losses), "rows": args.rows,
        "layers": args.layers, "width": args.width, "seed": args.seed, "learning_rate": args.learning_rate,
        "finite": finite and parameters_finite, "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
        "unigram_entropy": unigram_entropy(text), "largest_gradient_norm": max(norms),
        "memory": {n: {k: float(v) for k, v in values.items()} for n, values in records.items()},
        "cpu_seconds": time.process_time() - started,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark stability", description=__doc__)
    parser.add_argument("--blocks", nargs="+", default=["lmm", "mac", "mag", "mal"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[64, 16, 256])
    parser.add_argument("--long", type=int, default=4096, help="length for chunk 64")
    parser.add_argument("--short", type=int, default=1024, help="length for the other chunks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="file that receives the figures; runs already in it are not repeated")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    path = Path(args.json) if args.json else None
    results = json.loads(path.read_text()) if path and path.exists() else []
    done = {(r["block"], r["chunk_size"]) for r in results}
    for chunk in args.chunks:
        for block in args.blocks:
            if (block, chunk) in done:
                continue
            results.append(train(block, chunk, args.long if chunk == 64 else args.short, args))
            print({k: v for k, v in results[-1].items() if k != "memory"}, flush=True)
            if path:
                path.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(r["finite"] and r["loss"] < r["unigram_entropy"] for r in results) else 1
