"""`benchmark profile CONFIG [key.path=value ...]`: a few training steps under torch's profiler.

The engine and step that training uses, on random tokens in one process. Writes a trace that https://ui.perfetto.dev
and chrome://tracing open, and prints self time (on a GPU: of kernels, by the operator that launched them) by group of
operators, and the largest operators. On a CPU the profiler itself takes time with every operator.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from titans_train.benchmark import device
from titans_train.benchmark.training_steps import (
    TrainingSteps,
    checked_device,
    plan_of,
    split_overrides,
    training_steps,
)
from titans_train.benchmark.turns import in_a_process
from titans_train.errors import UserError
from titans_train.outputs import check_file
from titans_train.plan import Plan
from titans_train.training.ready import check_ready

GROUPS = ("matmul", "attention", "memory scan", "element-wise", "copies", "optimizer", "views", "other")
MATMUL = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "linear")
ATTENTION = ("attention", "flash", "flex")
COPIES = (
    "copy", "clone", "contiguous", "cat", "stack", "fill", "zero", "index", "gather", "scatter", "_to_copy", "pad",
)  # fmt: skip
VIEWS = (
    "view", "_unsafe_view", "reshape", "transpose", "permute", "select", "slice", "expand", "as_strided", "unfold", "t",
    "empty", "empty_like", "empty_strided", "unsqueeze", "squeeze", "split", "split_with_sizes", "detach", "alias",
)  # fmt: skip
SCAN = ("_Scan", "titans_train::")  # the memory's autograd Function, its own Python, and what it calls beside aten
PHASES = {"forward": "forward", "backward": "backward", "step": "optimizer"}
LARGEST = 15


def group_of(name: str, optimizing: bool) -> str:
    """optimizing: within the optimiser's step."""
    if optimizing or "_fused_adam" in name:
        return "optimizer"
    if name.startswith(SCAN):
        return "memory scan"
    operator = name.removeprefix("aten::").removesuffix("_")
    if any(word in name.lower() for word in ATTENTION):
        return "attention"
    if operator in MATMUL:
        return "matmul"
    if not name.startswith("aten::"):
        return "other"  # autograd's engine, and Python between operators
    if operator in VIEWS:
        return "views"
    return "copies" if any(operator.startswith(word) for word in COPIES) else "element-wise"


def self_times(events: Iterable[Any], name: str) -> tuple[Counter[str], Counter[str]]:
    """Microseconds by group, and by operator, on the device `name`."""
    groups, operators = Counter[str](), Counter[str]()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, which its operator has as well
        kernels = [k.duration for k in event.kernels if k.name != event.name]  # of its own name: a scope on the GPU
        took = sum(kernels) if name == "cuda" else event.self_cpu_time_total
        groups[group_of(event.name, _within(event, PHASES["step"]))] += took
        operators[event.name] += took
    return groups, operators


def _within(event: Any, scope: str) -> bool:
    while event is not None:
        if event.name == scope:
            return True
        event = event.cpu_parent
    return False


def name_phases(steps: TrainingSteps) -> None:
    """The trace shows forward, backward and optimizer, for good."""

    def named(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(phase):
                return function(*args, **kwargs)

        return run

    for owner, method in ((steps.engine.model, "forward"), (steps.engine, "backward"), (steps.engine, "step")):
        setattr(owner, method, named(getattr(owner, method), PHASES[method]))


def profiled(steps: TrainingSteps, count: int, name: str) -> Any:
    """The profiler of `count` steps, after one that is not in it."""
    name_phases(steps)
    steps.step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if name == "cuda" else [])
    with profile(activities=activities) as profiler:
        for _ in range(count):
            with record_function("training step"):
                steps.step()
        if name == "cuda":
            torch.cuda.synchronize()
    return profiler


def table(times: Counter[str], names: Iterable[str], what: str, steps: int) -> str:
    whole = sum(times.values())
    lines = [f"| {what} | ms per step | share |", "|---|---|---|"]
    for name in names:
        lines.append(f"| {name} | {times[name] / 1e3 / steps:,.2f} | {times[name] / max(whole, 1):.1%} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m titans_train benchmark profile", description=__doc__,
        usage="%(prog)s CONFIG.yaml [key.path=value ...] --output TRACE.json.gz [options]",
    )  # fmt: skip
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="file for the trace, NAME.json.gz or NAME.json")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step")
    parser.add_argument("--device", choices=device.DEVICES, help="default: a GPU where there is one, as training does")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # this is the process that does it
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    for name in ("steps", "micro_batches"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it is at least 1")
    if not options.output.name.endswith((".json.gz", ".json")):
        raise UserError(f"--output {options.output}: its name ends in .json.gz or .json, which trace viewers open")
    check_file("--output", options.output)
    where = checked_device(options.device)
    plan = plan_of(options.config, overrides, options.micro_batches)
    if options.one:
        work(plan, options, where)
        return 0
    check_ready(plan, where == "cuda")
    done = in_a_process("profile", [*argv, "--device", where, "--one"], where)
    print(done.stdout, end="")
    print(done.stderr if done.returncode else "", end="", file=sys.stderr)
    return done.returncode


def work(plan: Plan, options: argparse.Namespace, where: str) -> None:
    """In a process of its own."""
    with training_steps(plan) as steps:
        profiler = profiled(steps, options.steps, where)
    profiler.export_chrome_trace(str(options.output))
    groups, operators = self_times(profiler.events(), where)
    print(f"{plan.tokens_per_step:,} tokens per step; self time on {'the GPU' if where == 'cuda' else 'the CPU'}")
    print(table(groups, GROUPS, "group", options.steps))
    print()
    print(table(operators, [name for name, _ in operators.most_common(LARGEST)], "operator", options.steps))
    print(f"\n{options.output}: open it at https://ui.perfetto.dev or in chrome://tracing")
