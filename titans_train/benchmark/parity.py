"""`benchmark parity`: training on many processes against plain autograd in one.

Every block x layout (tensor x sequence shards x data, with and without Megatron's sequence parallelism) x ZeRO stage,
fp32, real gloo processes:
each parameter's gradient by name before clipping (at equal parameters; and at the two later steps), the gradient
norm, and the parameters after three AdamW steps without warm-up. Two micro-batches per step, numbers of valid tokens
unequal between ranks and micro-batches. In bf16 the same gradients against fp32, beside those of one process in bf16.
In float64 the model alone, without an engine (DeepSpeed's master weights are float32):
gradients of a weighted sum of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from titans_train.benchmark.parity_worker import STAGES, work
from titans_train.benchmark.processes import parser_of, report, rows_of
from titans_train.shape import BLOCKS

GRADIENT_LIMIT = 1e-5  # of max(a gradient's norm, 1e-3 of the global norm)
DOUBLE_LIMIT = 1e-11
BFLOAT16_FACTOR = 2.0  # times the error of one process in bf16


@dataclass(frozen=True)
class Layout:
    tensor: int = 1
    data: int = 1
    sequence_parallel: bool = False
    sequence: int = 1
    wave: int = 1  # micro-batches forwarded before their backward

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data


SHARDED = [  # both micro-batches of a step in one wave, or one after the other
    Layout(sequence=2), Layout(sequence=4, wave=2), Layout(tensor=2, sequence=2, sequence_parallel=True),
    Layout(sequence=2, data=2, wave=2), Layout(tensor=2, sequence=2, data=2, wave=2),
]  # fmt: skip
LAYOUTS = [
    Layout(t, d, s) for t in (1, 2, 4) for d in (1, 2) for s in ((False, True) if t > 1 else (False,))
] + SHARDED  # fmt: skip


def run(
    blocks: list[str], layouts: list[Layout], stages: list[int], kinds: list[str] | None = None
) -> list[dict[str, Any]]:
    """The table's rows."""
    return rows_of("parity", layouts, blocks=blocks, stages=stages, kinds=["float32"] if kinds is None else kinds)


def failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows beyond their limit. bf16 rows need that of one process in the same table."""
    alone = {r["block"]: r["gradient"] for r in rows if r["kind"] == "bfloat16" and _ranks(r) == 1}

    def limit(row: dict[str, Any]) -> float:
        if row["kind"] == "bfloat16":
            return BFLOAT16_FACTOR * float(alone[row["block"]])
        return GRADIENT_LIMIT if row["kind"] == "float32" else DOUBLE_LIMIT

    return [r for r in rows if not r["gradient"] <= limit(r)]


def _ranks(row: dict[str, Any]) -> int:
    return int(row["tensor"] * row["sequence"] * row["data"])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; the largest errors over the ZeRO stages of a layout."""
    columns = [
        "block", "tensor x sequence x data", "sequence parallel", "ZeRO", "gradient", "later", "norm", "parameters",
        "bf16", "float64",
    ]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    keys = ("block", "tensor", "sequence", "data", "sequence_parallel")
    for layout in dict.fromkeys(tuple(r[key] for key in keys) for r in rows):
        here = [r for r in rows if tuple(r[key] for key in keys) == layout]
        block, *sizes, shared = layout

        def worst(kind: str, key: str, here: list[dict[str, Any]] = here) -> str:
            values = [r[key] for r in here if r["kind"] == kind]
            return f"{max(values):.1e}" if values else ""

        stages = ", ".join(str(r["zero"]) for r in here if r["kind"] == "float32")
        figures = [worst("float32", key) for key in ("gradient", "later", "norm", "parameter")]
        figures += [worst("bfloat16", "gradient"), worst("float64", "gradient")]
        mesh = " x ".join(map(str, sizes))
        lines.append(f"| {block} | {mesh} | {'yes' if shared else 'no'} | {stages} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = parser_of("parity", __doc__)
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS)
    parser.add_argument("--stages", nargs="+", type=int, default=STAGES, choices=STAGES)
    parser.add_argument("--tensor", nargs="+", type=int, default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--sequence", nargs="+", type=int, default=[1, 2, 4], choices=[1, 2, 4])
    parser.add_argument("--data", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--kinds", nargs="+", default=["float32", "bfloat16", "float64"])
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    wanted = [x for x in LAYOUTS if x.tensor in args.tensor and x.sequence in args.sequence and x.data in args.data]
    layouts = [x for x in LAYOUTS if x in wanted or x.ranks == 1]
    rows = run(args.blocks, layouts, args.stages, args.kinds)
    return report(rows, table(rows), args.json, failures(rows), "beyond its limit")
