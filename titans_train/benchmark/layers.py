"""`benchmark layers`: blocks side by side in one run, forward and backward with all gradients.

Ours (LMM, MAC, MAG, MAL at every chunk), the Transformer++ block with full attention and with a sliding window, and
Gated DeltaNet, all with the same feed-forward; and titans-pytorch's layer, in its exact and its chunk-gated mode, for
which `layer` (ours without a feed-forward) is the counterpart. Each case runs in a process of its own, and the cases
take turns. Tokens per second (of CPU time on one thread; on a GPU between CUDA events), peak memory above inputs and
parameters, what is kept from forward to backward, and FLOPs (recomputation left out, causal attention counted half)
as a share of the matmul rate measured in the same process.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_train.benchmark import device, record
from titans_train.benchmark.cost import measure
from titans_train.benchmark.layer_cases import (
    CHUNKED,
    KERNELS,
    LABELS,
    LAYER_PEERS,
    TITANS,
    Sizes,
    flops_of,
    prepared,
    shape_of,
)
from titans_train.benchmark.turns import Figures, begin, in_turns, unit
from titans_train.errors import UserError
from titans_train.memory import kernels
from titans_train.outputs import check_file

GATED_DELTANET_CHUNK = 64  # changes its speed only


@dataclass(frozen=True)
class Case:
    what: str  # of LABELS
    chunk: int
    length: int

    @property
    def label(self) -> str:
        """Without its length."""
        return LABELS[self.what] + (f", b={self.chunk}" if self.what in CHUNKED else "")


def cases_of(options: argparse.Namespace) -> dict[str, Case]:
    found = {}
    for length in options.lengths:
        for what in options.blocks:
            for chunk in options.chunks if what in CHUNKED else [GATED_DELTANET_CHUNK]:
                case = Case(what, chunk, length)
                found[f"{case.label}, L={length}"] = case
    return found


def measured(case: Case, sizes: Sizes) -> Figures:
    """In a fresh process."""
    begin()
    shape = shape_of(case.what, case.chunk, case.length, sizes)
    flops = None if shape is None else flops_of(case.what, shape, case.length)
    prepare = prepared(case.what, shape, case.chunk, sizes)
    return measure(
        prepare, case.length, sizes.device, sizes.dtype, batch=sizes.batch, flops=flops, compiled=sizes.compile
    )


def table(results: dict[str, dict[str, Any]], per: str) -> str:
    lines = [f"| | tokens/{per} | us/token | peak MiB | kept KiB/token | of matmul rate |", "|---" * 6 + "|"]
    for name, r in results.items():
        used = f"{r['utilisation']:.0%}" if "utilisation" in r else ""
        kept = f"{r['activation_kib_per_token']:,.1f}" if "activation_kib_per_token" in r else ""
        lines.append(
            f"| {name} | {r['tokens_per_second']:,.0f} | {1e6 * r['seconds_per_token']:,.2f} | {r['peak_mib']:,.0f} | "
            f"{kept} | {used} |"
        )
    return "\n".join(lines)


def ratios(cases: dict[str, Case], results: dict[str, dict[str, Any]]) -> list[str]:
    """Blocks to full attention of their length; our layer alone to titans-pytorch's of its length and chunk."""
    lines = []
    for name, case in cases.items():
        for other, beside in cases.items():
            if case.length == beside.length and _stand_together(case, beside) and {name, other} <= results.keys():
                mine, theirs = results[name], results[other]
                speed = mine["tokens_per_second"] / theirs["tokens_per_second"]
                memory = mine["peak_mib"] / max(theirs["peak_mib"], 1)
                lines.append(f"{name} / {beside.label}: {speed:.2f}x the tokens/s, {memory:.2f}x the memory")
    return lines


def _stand_together(case: Case, beside: Case) -> bool:
    if beside.what in LAYER_PEERS:
        return case.what == "layer" and case.chunk == beside.chunk
    return beside.what == "transformer" and case.what not in ("transformer", "layer", *LAYER_PEERS)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark layers", description=__doc__)
    parser.add_argument("--device", choices=device.DEVICES, default="cpu")
    parser.add_argument("--dtype", choices=device.DTYPES, default="float32")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64], help="of the blocks with a memory of ours")
    parser.add_argument("--blocks", nargs="+", choices=LABELS, default=["lmm", "transformer"])
    parser.add_argument("--window", type=int, default=512, help="of sliding attention; and MAC's segment")
    parser.add_argument("--batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kernels", choices=KERNELS, default="auto", help="memory.kernels of our blocks")
    parser.add_argument("--compile", action="store_true", help="model.compile, of all blocks")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the case of this process
    return parser


def _checked(options: argparse.Namespace) -> Sizes:
    """UserError before any work."""
    for name in ("lengths", "chunks", "window", "batch", "rounds"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise UserError(f"--{name} has {value}; it is at least 1")
    check_file("--json", options.json)
    device.check(options.device)
    if any(what in TITANS for what in options.blocks):
        kernels.check(options.kernels, cuda=options.device == "cuda")
    return Sizes(
        options.dim, options.heads, options.window, options.batch, options.kernels, options.compile, options.dtype,
        options.device,
    )  # fmt: skip


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    sizes, cases = _checked(options), cases_of(options)
    if options.one:
        print(json.dumps(measured(cases[options.one], sizes)))
        return 0
    for case in cases.values():
        shape_of(case.what, case.chunk, case.length, sizes)
    results, failed = in_turns("layers", argv, list(cases), options.rounds, options.device)
    print(table(results, unit(options.device)))
    for line in ratios(cases, results):
        print(f"\n{line}")
    if options.json:
        record.write(options.json, record.about("layers", argv, options.device, options.dtype), results)
    return 1 if failed else 0
