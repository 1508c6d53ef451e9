"""`benchmark memory`: forward and backward with all gradients, dim 256, 4 heads, 2-layer memory, fp32, one thread.

Every case runs in a process of its own, so that peak memory is its own, and the cases take turns, so that a busy
minute of the machine hits all of them. Tokens per CPU second, peak resident memory above the inputs, and the share of
the matmul rate measured in the same process. FLOPs exclude recomputation; peers' FLOPs are not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.benchmark.dual_autograd import dual_autograd
from titans_train.benchmark.titans_pytorch_peer import peer
from titans_train.memory import MemoryState, memory_scan
from titans_train.models.blocks import Block, BlockState, LMMBlock, TransformerBlock
from titans_train.models.parts import SingleDevice
from titans_train.shape import AttentionShape, MemoryShape, ModelShape

AT_LEAST = 1.5  # CPU seconds a case is repeated for
DIM, HEADS, EXPANSION = 256, 4, 4
HEAD_DIM = DIM // HEADS
HIDDEN = EXPANSION * HEAD_DIM

# case: (what, chunk, length, with the norm inside the memory)
CASES = {
    "ours, operator, b=16": ("operator", 16, 512, True),
    "ours, operator without norm, b=16": ("operator", 16, 512, False),
    "autograd dual form, b=16": ("autograd", 16, 512, True),
    "ours, layer, b=16": ("layer", 16, 512, True),
    "titans-pytorch, layer, exact, b=16": ("peer exact", 16, 512, True),
    "ours, operator, b=64": ("operator", 64, 4096, True),
    "ours, operator without norm, b=64": ("operator", 64, 4096, False),
    "autograd dual form, b=64": ("autograd", 64, 4096, True),
    "autograd dual form without norm, b=64": ("autograd", 64, 4096, False),
    "ours, layer, b=64": ("layer", 64, 4096, True),
    "titans-pytorch, layer, chunk-gated, b=64": ("peer gated", 64, 4096, True),
    "ours, LMM block, b=64": ("block", 64, 4096, True),
    "Transformer++ block": ("transformer", 64, 4096, True),
    "ours, LMM block, b=64, 16384": ("block", 64, 16384, True),
    "Transformer++ block, 16384": ("transformer", 64, 16384, True),
}  # fmt: skip


def model_shape(block: str, chunk: int, norm: bool) -> ModelShape:
    memory = MemoryShape(
        rule="titans", chunk_size=chunk, depth=2, hidden=HIDDEN, activation="silu", residual_norm=norm, momentum=True,
        forgetting=True, forget_to="zero", write=True, normalize_values=True, convolution=4, key_start="token",
        gate="memory", theta_max=4 / chunk, couple_theta=True,
        forget_bias=-6.0, momentum_bias=0.0, theta_bias=0.0, store_every=max(1, min(16, 1024 // chunk)),
    )  # fmt: skip
    return ModelShape(
        block, 1, DIM, HEADS, HEAD_DIM, 264, 264, 704, True, 1e-5, 0.02,
        None if block == "transformer" else memory, AttentionShape(None, None, False, 0, 10000.0),
    )  # fmt: skip


def operator_inputs(length: int, norm: bool) -> tuple[list[Tensor], tuple[Tensor, Tensor], dict[str, Tensor]]:
    """q, k, v, alpha, eta, theta; the initial weights; gain and bias. Gates near what trained models have."""

    def rows(*shape: int) -> Tensor:
        return torch.rand(1, HEADS, length, *shape)

    qkv = [F.normalize(rows(HEAD_DIM) - 0.5, dim=-1).requires_grad_() for _ in range(3)]
    gates = [(rows() * scale).requires_grad_() for scale in (1e-3, 0.9, 0.05)]
    weights = tuple(
        (torch.randn(1, HEADS, a, b) * a**-0.5).requires_grad_() for a, b in ((HEAD_DIM, HIDDEN), (HIDDEN, HEAD_DIM))
    )
    options = {}
    if norm:
        options = {
            "gain": torch.full((HEADS, HEAD_DIM), HEAD_DIM**-0.5, requires_grad=True),
            "bias": torch.zeros(HEADS, HEAD_DIM, requires_grad=True),
        }
    return [*qkv, *gates], (weights[0], weights[1]), options


def build(what: str, chunk: int, length: int, norm: bool) -> Callable[[int], None]:
    """A function of a length that runs one forward and backward, with every gradient."""
    if what in ("operator", "autograd"):

        def operator(n: int) -> None:
            inputs, weights, options = operator_inputs(n, norm)
            state = MemoryState.start(weights)
            if what == "operator":
                store_every = max(1, min(16, 1024 // chunk))
                y, _ = memory_scan(*inputs, state, chunk_size=chunk, store_every=store_every, **options)  # type: ignore[arg-type, misc]
            else:
                y = dual_autograd(*inputs, state, chunk_size=chunk, **options)  # type: ignore[arg-type, misc]
            y.square().sum().backward()

        return operator
    module: Any
    if what.startswith("peer"):
        # Its exact mode takes the gradients of a chunk at one anchor, token by token;
        # its chunked mode shares the gates.
        exact = what == "peer exact"
        module = peer(DIM, HEADS, chunk if exact else None, 1 if exact else chunk, norm)
    elif what == "layer":
        module = LayerAlone(chunk, norm)
    else:
        kind = LMMBlock if what == "block" else TransformerBlock
        module = kind(model_shape("lmm" if what == "block" else "transformer", chunk, norm), SingleDevice())

    def layer(n: int) -> None:
        x = torch.randn(1, n, DIM, requires_grad=True)
        out = module(x.flatten(0, 1), 1) if isinstance(module, Block | LayerAlone) else module(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        module.zero_grad()

    return layer


class LayerAlone(torch.nn.Module):
    """What titans-pytorch calls its layer: pre-norm, the memory, a gate, the output projection."""

    def __init__(self, chunk: int, norm: bool) -> None:
        super().__init__()
        shape = model_shape("lmm", chunk, norm)
        self.norm = torch.nn.RMSNorm(DIM)
        self.block = LMMBlock(shape, SingleDevice())
        self.block.feed_forward = torch.nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor, batch: int) -> tuple[Tensor, BlockState]:
        return self.block.mix(self.norm(x), batch, None, None)


def operator_flops(chunk: int) -> float:
    """Per token, forward and backward, recomputation left out: 66 d h + 12 b (d + h) for each head."""
    return HEADS * (66.0 * HEAD_DIM * HIDDEN + 12.0 * chunk * (HEAD_DIM + HIDDEN))


def matmul_rate() -> float:
    """FLOPs per CPU second of a 1024^3 product, fp32."""
    a = torch.randn(1024, 1024)
    for _ in range(2):
        a @ a
    started = time.process_time()
    for _ in range(8):
        a @ a
    return 8 * 2 * 1024**3 / (time.process_time() - started)


def measure(case: str) -> dict[str, float]:
    """In a fresh process: CPU seconds per token and peak memory of one forward and backward."""
    what, chunk, length, norm = CASES[case]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run = build(what, chunk, length, norm)
    run(min(length, 256))  # warm-up: allocator, threads, kernels
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, repeats = 0.0, 0
    while seconds < AT_LEAST:
        started = time.process_time()
        run(length)
        seconds, repeats = seconds + time.process_time() - started, repeats + 1
    seconds /= repeats
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rate = matmul_rate()
    figures = {"tokens_per_second": length / seconds, "peak_mib": (peak - before) / 1024, "matmul_gflops": rate / 1e9}
    if what == "operator":
        figures["utilisation"] = operator_flops(chunk) * length / seconds / rate
    return figures


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| | tokens/CPU-s | peak MiB | of matmul rate |", "|---|---|---|---|"]
    for case, r in results.items():
        used = f"{r['utilisation']:.0%}" if "utilisation" in r else ""
        lines.append(f"| {case}, L={CASES[case][2]} | {r['tokens_per_second']:,.0f} | {r['peak_mib']:,.0f} | {used} |")
    pairs = [
        ("ours, layer, b=16", "titans-pytorch, layer, exact, b=16"),
        ("ours, layer, b=64", "titans-pytorch, layer, chunk-gated, b=64"),
        ("ours, operator, b=16", "autograd dual form, b=16"),
        ("ours, operator, b=64", "autograd dual form, b=64"),
        ("ours, operator without norm, b=64", "autograd dual form without norm, b=64"),
        ("ours, LMM block, b=64", "Transformer++ block"),
        ("ours, LMM block, b=64, 16384", "Transformer++ block, 16384"),
    ]
    for a, b in pairs:
        if a in results and b in results:
            ratio = results[a]["tokens_per_second"] / results[b]["tokens_per_second"]
            memory = results[a]["peak_mib"] / max(results[b]["peak_mib"], 1)
            lines.append(f"\n{a} / {b}: {ratio:.2f}x the tokens/s, {memory:.2f}x the memory")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    rounds: dict[str, list[dict[str, float]]] = {case: [] for case in args.cases}
    for n in range(args.rounds):
        for case in args.cases:
            command = [sys.executable, "-m", "titans_train", "benchmark", "memory", "--one", case]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rounds[case].append(json.loads(output.splitlines()[-1]))
            print(f"round {n + 1}: {case}: {rounds[case][-1]['tokens_per_second']:,.0f} tokens/CPU-s", file=sys.stderr)
    results = {
        case: {key: statistics.median(r[key] for r in runs) for key in runs[0]} | {"rounds": runs}
        for case, runs in rounds.items()
    }
    print(table(results))
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine(), "threads": 1}
        Path(args.json).write_text(json.dumps({"about": about, "cases": results}, indent=1) + "\n")
    return 0
