"""`benchmark model`: whole training steps of configs, each beside the Transformer of the same size.

Forward, backward, clipping and optimiser, by the engine and the step that training uses, on random tokens in one
process; each case in a process of its own. Tokens per second (of CPU time on one thread; on a GPU between CUDA
events), peak memory of the process (on a GPU: of its allocator), parameters and optimiser included, and MFU: FLOPs of
a token, forward and backward, products only, recomputation left out (`plan CONFIG` prints them by part) x tokens per
second / the device's FLOPs per second, which are measured with a large matmul in run.dtype if nothing states them.
Further steps with a clock at every border of a part say where the time goes. key.path=value changes every config.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titans_train.benchmark import device, record
from titans_train.benchmark.step_parts import PARTS, PHASES, watch
from titans_train.benchmark.training_steps import (
    checked_device,
    plan_of,
    split_overrides,
    training_steps,
)
from titans_train.benchmark.turns import Figures, in_turns, unit
from titans_train.errors import UserError
from titans_train.monitoring.throughput import peak_memory_bytes
from titans_train.outputs import check_file
from titans_train.plan import Plan
from titans_train.shape import BLOCKS
from titans_train.training.ready import check_ready

SIZES = Path(__file__).resolve().parents[2] / "configs" / "sizes"
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Case:
    source: str  # folder's or file's name
    block: str
    plan: Plan

    @property
    def length(self) -> int:
        return self.plan.config.training.sequence_length

    @property
    def name(self) -> str:
        return f"{self.source} {self.block}, L={self.length}"


def cases_of(options: argparse.Namespace, overrides: list[str]) -> dict[str, Case]:
    """ConfigError: a config is not right."""
    found = {}
    for path in options.configs:
        for file, more in _files(path, options.blocks):
            for length in options.lengths or [None]:
                plan = plan_of(file, [*overrides, *more], options.micro_batches, length)
                case = Case(path.stem if path.suffix in (".yaml", ".yml") else path.name, plan.shape.block, plan)
                found[case.name] = case
    return found


def _files(path: Path, blocks: list[str] | None) -> list[tuple[Path, list[str]]]:
    """Of a folder with a file for each block; or a file, by itself or as each block."""
    if path.is_dir():
        return [(path / f"{block}.yaml", []) for block in blocks or BLOCKS]
    return [(path, [f"model.block={block}"]) for block in blocks] if blocks else [(path, [])]


def measured(case: Case, options: argparse.Namespace) -> Figures:
    """In a fresh process."""
    plan, config = case.plan, case.plan.config
    tokens, name = plan.tokens_per_step, options.device
    with training_steps(plan) as steps:
        for _ in range(WARM_UP):
            steps.step()
        seconds = statistics.median(device.seconds(steps.step, name) for _ in range(options.steps))
        peak = peak_memory_bytes()
        timeline = watch(steps.engine, name)
        steps.step()
        timeline.marks.clear()
        watched = device.seconds(lambda: _marked(steps.step, timeline), name, options.steps)
        spent = {where: took / options.steps for where, took in timeline.seconds().items()}
    stated = options.peak_tflops * 1e12 if options.peak_tflops else config.monitoring.peak_flops
    rate = stated or device.matmul_rate(name, device.DTYPES[config.run.dtype])
    figures = {
        "tokens_per_second": tokens / seconds, "step_seconds": seconds, "peak_mib": peak / 2**20,
        "mfu": plan.flops_per_token * tokens / seconds / rate, "peak_gflops": rate / 1e9,
        "token_mflops": plan.flops_per_token / 1e6, "parameters": float(plan.parameter_count),
        "watched_step_seconds": watched,
    }  # fmt: skip
    for phase in PHASES:
        figures[f"{phase}_seconds"] = sum(spent.get((phase, part), 0.0) for part in PARTS)
    for phase in ("forward", "backward"):
        figures |= {f"{phase}_{part}_seconds": spent.get((phase, part), 0.0) for part in PARTS}
    return figures


def _marked(step: Any, timeline: Any) -> None:
    timeline.mark()
    step()
    timeline.mark()


def table(cases: dict[str, Case], results: dict[str, dict[str, Any]], per: str) -> str:
    lines = [f"| | parameters | tokens/{per} | to transformer | MFU | peak MiB | step, s |", "|---" * 7 + "|"]
    for name, r in results.items():
        case = cases[name]
        other = results.get(Case(case.source, "transformer", case.plan).name)
        ratio = f"{r['tokens_per_second'] / other['tokens_per_second']:.2f}x" if other and other is not r else ""
        lines.append(
            f"| {name} | {r['parameters'] / 1e6:,.1f}M | {r['tokens_per_second']:,.0f} | {ratio} | {r['mfu']:.1%} | "
            f"{r['peak_mib']:,.0f} | {r['step_seconds']:,.3f} |"
        )
    return "\n".join(lines)


def table_of_parts(results: dict[str, dict[str, Any]]) -> str:
    """Shares of a step: its phases; and of forward and backward together the parts."""
    heads = [*PHASES, *(part.replace("_", "-") for part in PARTS)]
    lines = [f"| share of a step | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, r in results.items():
        phases = [r[f"{phase}_seconds"] for phase in PHASES]
        parts = [r[f"forward_{part}_seconds"] + r[f"backward_{part}_seconds"] for part in PARTS]
        shares = " | ".join(f"{took / sum(phases):.1%}" for took in [*phases, *parts])
        lines.append(f"| {name} | {shares} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titans_train benchmark model",
        description=__doc__,
        usage="%(prog)s [options] [key.path=value ...]",
    )
    parser.add_argument(
        "--configs", nargs="+", type=Path, default=[SIZES / "340M", SIZES / "760M"],
        help="YAML files, or folders with BLOCK.yaml for each block (default: the 340M and 760M sizes)",
    )  # fmt: skip
    parser.add_argument(
        "--blocks", nargs="+", choices=BLOCKS, help="of a folder (default: all); a file as each of them"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="of sequences, with rows for as many tokens as before")
    parser.add_argument("--steps", type=int, default=5, help="that are timed (the median counts), after two others")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=device.DEVICES, help="default: a GPU where there is one, as training does")
    parser.add_argument("--peak-tflops", type=float, help="of the device in run.dtype, for the MFU")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the case of this process
    return parser


def main(argv: list[str]) -> int:
    overrides, rest = split_overrides(argv)
    options = parser().parse_args(rest)
    for name in ("steps", "micro_batches", "rounds", "peak_tflops", "lengths"):
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not number > 0:
                raise UserError(f"--{name.replace('_', '-')} is {number}; it is above 0")
    check_file("--json", options.json)
    options.device = checked_device(options.device)
    cases = cases_of(options, overrides)
    if options.one:
        print("\n" + json.dumps(measured(cases[options.one], options)))
        return 0
    for case in cases.values():
        check_ready(case.plan, options.device == "cuda")
    results, failed = in_turns("model", argv, list(cases), options.rounds, options.device)
    print(f"{table(cases, results, unit(options.device))}\n\n{table_of_parts(results)}")
    if options.json:
        dtypes = "/".join(sorted({case.plan.config.run.dtype for case in cases.values()}))
        more = {"micro_batches": options.micro_batches, "warm_up": WARM_UP, "steps": options.steps}
        record.write(options.json, record.about("model", argv, options.device, dtypes, **more), results)
    return 1 if failed else 0
