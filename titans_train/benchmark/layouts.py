"""`benchmark layouts`: what a layout costs, measured beside the plan.

For every layout, on real gloo processes: the collectives of one layer (forward, backward, gradients of shared
parameters) and of a whole micro-batch, and what goes from shard to shard, counted where torch hands it to the process
group (on every rank; the last but one shard's is shown); and the peak of a training step in tensors, counted as they
are made and freed, on the rank that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titans_train.benchmark.layouts_worker import work
from titans_train.benchmark.processes import parser_of, report, rows_of
from titans_train.shape import BLOCKS, PEERS


@dataclass(frozen=True)
class Layout:
    block: str  # or block-rule
    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    zero: int = 1
    dtype: str = "float32"
    checkpointing: bool = False
    sequence: int = 1
    wave: int = 1
    linear: bool = False  # a memory of depth 1 without norm, by the affine scan

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data


LAYOUTS = [
    *(Layout(block, tensor=2, sequence_parallel=shared) for block in BLOCKS for shared in (False, True)),
    *(Layout(f"lmm-{rule}", tensor=2) for rule in PEERS),
    *(Layout(f"lmm-{rule}", sequence=2) for rule in ("gated_deltanet", "rwkv7")),
    Layout("mag-gated_deltanet", tensor=2, sequence_parallel=True),
    Layout("mag", data=2),
    Layout("mag", data=2, zero=2, dtype="bfloat16"),
    Layout("mag", data=2, zero=3),
    Layout("mac", tensor=2, zero=2, checkpointing=True),
    Layout("lmm", tensor=2, sequence_parallel=True, dtype="bfloat16"),
    Layout("mag", tensor=2, data=2, sequence_parallel=True, zero=3),
    Layout("mal", tensor=4, sequence_parallel=True),
    Layout("transformer", tensor=2, data=2, zero=2),
    *(Layout(block, sequence=2) for block in BLOCKS),
    Layout("mag", sequence=2, wave=2, checkpointing=True),
    Layout("lmm", sequence=2, linear=True),
    Layout("lmm", sequence=2, wave=2),
    Layout("mal", sequence=4),
    Layout("mac", tensor=2, sequence=2, sequence_parallel=True, zero=2),
]


def run(layouts: list[Layout]) -> list[dict[str, Any]]:
    """One row for each layout."""
    return rows_of("layouts", layouts)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = [
        "block", "tensor x sequence x data", "sequence parallel", "ZeRO", "dtype", "one layer, forward", "backward",
        "shared", "peak, MiB", "plan, MiB", "plan / peak",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in rows:
        counted = [r["messages"][p]["text"] if r["messages"] else "" for p in ("forward", "backward", "shared")]
        how = [r["dtype"], *(["checkpointing"] if r["checkpointing"] else []), *(["affine"] if r["linear"] else [])]
        how += [f"waves of {r['wave']}"] if r["wave"] > 1 else []
        lines.append(
            f"| {r['block']} | {r['tensor']} x {r['sequence']} x {r['data']} "
            f"| {'yes' if r['sequence_parallel'] else 'no'} | {r['zero']} | {', '.join(how)} | {' | '.join(counted)} "
            f"| {r['peak'] / 2**20:.1f} | {r['plan'] / 2**20:.1f} | {r['plan'] / r['peak']:.2f} |"
        )
    return "\n".join(lines)


def unplanned(row: dict[str, Any]) -> list[str]:
    """Where counted messages (number or bytes) differ from the plan's."""
    return [part for part, m in row["messages"].items() if m["counted"] != m["planned"]]


def main(argv: list[str]) -> int:
    args = parser_of("layouts", __doc__).parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    rows = run(LAYOUTS)
    return report(rows, table(rows), args.json, [row for row in rows if unplanned(row)], "not as planned")
