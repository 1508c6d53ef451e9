"""`benchmark memory`: forward and backward with all gradients, dim 256, 4 heads, 2-layer memory, fp32, one thread.

Every case runs in a process of its own, so that peak memory is its own, and the cases take turns, so that a busy
minute of the machine hits all of them. Tokens per CPU second, peak resident memory above inputs and parameters, what is
kept from forward to backward (inputs included), and the share of the matmul rate measured in the same process. FLOPs
exclude recomputation; peers' FLOPs are not counted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.benchmark import record
from titans_train.benchmark.cost import Work, measure
from titans_train.benchmark.dual_autograd import dual_autograd
from titans_train.benchmark.layer_cases import KERNELS, Sizes, flops_of, prepared, shape_of
from titans_train.benchmark.turns import Figures, begin, in_turns
from titans_train.errors import UserError
from titans_train.memory import MemoryState, kernels, memory_scan
from titans_train.outputs import check_file

DIM, HEADS, EXPANSION = 256, 4, 4
HEAD_DIM = DIM // HEADS
HIDDEN = EXPANSION * HEAD_DIM

# case: (what, chunk, length, with the norm inside the memory)
CASES = {
    "ours, operator, b=16": ("operator", 16, 512, True),
    "ours, operator without norm, b=16": ("operator", 16, 512, False),
    "autograd dual form, b=16": ("autograd", 16, 512, True),
    "ours, layer, b=16": ("layer", 16, 512, True),
    "titans-pytorch, layer, exact, b=16": ("titans_pytorch", 16, 512, True),
    "ours, operator, b=64": ("operator", 64, 4096, True),
    "ours, operator without norm, b=64": ("operator", 64, 4096, False),
    "autograd dual form, b=64": ("autograd", 64, 4096, True),
    "autograd dual form without norm, b=64": ("autograd", 64, 4096, False),
    "ours, layer, b=64": ("layer", 64, 4096, True),
    "titans-pytorch, layer, chunk-gated, b=64": ("titans_pytorch_gated", 64, 4096, True),
    "ours, LMM block, b=64": ("lmm", 64, 4096, True),
    "Transformer++ block": ("transformer", 64, 4096, True),
    "ours, operator, b=64, 16384": ("operator", 64, 16384, True),
    "ours, LMM block, b=64, 16384": ("lmm", 64, 16384, True),
    "Transformer++ block, 16384": ("transformer", 64, 16384, True),
    "ours, operator, b=64, 65536": ("operator", 64, 65536, True),
}
PAIRS = [
    ("ours, layer, b=16", "titans-pytorch, layer, exact, b=16"),
    ("ours, layer, b=64", "titans-pytorch, layer, chunk-gated, b=64"),
    ("ours, operator, b=16", "autograd dual form, b=16"),
    ("ours, operator, b=64", "autograd dual form, b=64"),
    ("ours, operator without norm, b=64", "autograd dual form without norm, b=64"),
    ("ours, LMM block, b=64", "Transformer++ block"),
    ("ours, LMM block, b=64, 16384", "Transformer++ block, 16384"),
]
LONG = "ours, operator, b=64"  # the case that longer ones, of the same name and their length, stand beside


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


def operator(what: str, chunk: int, norm: bool, how: str) -> Callable[[int], Work]:
    """what: operator (ours) or autograd; how: as memory.kernels."""

    def prepare(length: int) -> Work:
        inputs, weights, options = operator_inputs(length, norm)

        def forward() -> Tensor:
            state = MemoryState.start(weights)
            if what == "autograd":
                return dual_autograd(*inputs, state, chunk_size=chunk, **options)  # type: ignore[arg-type, misc]
            store_every = max(1, min(16, 1024 // chunk))
            given = {"chunk_size": chunk, "store_every": store_every, "kernels": how}
            y, _ = memory_scan(*inputs, state, **given, **options)  # type: ignore[arg-type, misc]
            return y

        parameters = [*weights, *options.values()]
        return Work(forward, [*inputs, *parameters], parameters)

    return prepare


def operator_flops(chunk: int) -> float:
    """Per token, forward and backward, recomputation left out: 66 d h + 12 b (d + h) for each head."""
    return HEADS * (66.0 * HEAD_DIM * HIDDEN + 12.0 * chunk * (HEAD_DIM + HIDDEN))


def measured(case: str, how: str, compile: bool = False) -> Figures:
    """In a fresh process."""
    what, chunk, length, norm = CASES[case]
    begin()
    if what in ("operator", "autograd"):
        prepare, flops = operator(what, chunk, norm, how), operator_flops(chunk) if what == "operator" else None
    else:
        sizes = Sizes(DIM, HEADS, kernels=how, compile=compile)
        shape = shape_of(what, chunk, length, sizes)
        prepare = prepared(what, shape, chunk, sizes)
        flops = None if shape is None else flops_of(what, shape, length)
    return measure(prepare, length, "cpu", "float32", flops=flops, compiled=compile)


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = ["| | tokens/CPU-s | peak MiB | kept KiB/token | of matmul rate |", "|---|---|---|---|---|"]
    for case, r in results.items():
        used = f"{r['utilisation']:.0%}" if "utilisation" in r else ""
        kept = f"{r['activation_kib_per_token']:.1f}" if "activation_kib_per_token" in r else ""
        lines.append(
            f"| {case}, L={CASES[case][2]} | {r['tokens_per_second']:,.0f} | {r['peak_mib']:,.0f} | {kept} | {used} |"
        )
    for a, b in PAIRS:
        if a in results and b in results:
            ratio = results[a]["tokens_per_second"] / results[b]["tokens_per_second"]
            memory = results[a]["peak_mib"] / max(results[b]["peak_mib"], 1)
            lines.append(f"\n{a} / {b}: {ratio:.2f}x the tokens/s, {memory:.2f}x the memory")
    return "\n".join(lines + by_length(results))


def by_length(results: dict[str, dict[str, Any]]) -> list[str]:
    """How the operator's time and memory per token change with the length."""
    lines = []
    for case, r in results.items():
        if case.startswith(LONG) and case != LONG and LONG in results:
            length, short = CASES[case][2], CASES[LONG][2]
            time = r["seconds_per_token"] / results[LONG]["seconds_per_token"]
            peak = 1024 * r["peak_mib"] / length
            lines.append(
                f"\n{case} / at {short}: {time:.2f}x the time per token; {peak:.1f} KiB per token at the peak above "
                f"the inputs, {r['activation_kib_per_token']:.1f} kept with the inputs"
            )
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark memory", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="memory.kernels of ours")
    parser.add_argument("--compile", action="store_true", help="model.compile, of all blocks and layers of ours")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1:
        raise UserError(f"--rounds is {options.rounds}; it is at least 1")
    check_file("--json", options.json)
    kernels.check(options.kernels, cuda=False)
    if options.one:
        print(json.dumps(measured(options.one, options.kernels, options.compile)))
        return 0
    results, failed = in_turns("memory", argv, options.cases, options.rounds, "cpu")
    print(table(results))
    if options.json:
        record.write(options.json, record.about("memory", argv, "cpu", "float32"), results)
    return 1 if failed else 0
