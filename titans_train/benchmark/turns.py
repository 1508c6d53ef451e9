"""Cases of a benchmark, each in a process of its own, taking turns over rounds.

So peak memory is a case's own, and a busy minute of the machine hits all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from titans_train.host import flush_denormals, keep_freed_memory

Figures = dict[str, float]


def unit(device: str) -> str:
    """Of what time is counted in."""
    return "CPU-s" if device == "cpu" else "s"


def begin() -> None:
    """A case in its process: one thread, the processor and memory as training has them, the same random numbers every
    time.
    """
    torch.set_num_threads(1)
    flush_denormals()
    keep_freed_memory()
    torch.manual_seed(0)


def in_turns(
    verb: str, argv: Sequence[str], cases: Sequence[str], rounds: int, device: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Medians over the rounds, and the "rounds" themselves, of each case; and the cases that failed.

    A process is the verb with `argv` and `--one CASE`; the last line that it prints is its figures as JSON. Their
    tokens per second are told at once, on stderr; and why a case failed, which is then left out.
    """
    found: dict[str, list[Figures]] = {case: [] for case in cases}
    failed: list[str] = []
    for number in range(1, rounds + 1):
        for case in [c for c in cases if c not in failed]:
            figures = _one(verb, [*argv, "--one", case], device)
            if isinstance(figures, str):
                failed.append(case)
                print(f"{case} failed, and is left out:\n{figures}", file=sys.stderr)
                continue
            found[case].append(figures)
            speed = f"{figures['tokens_per_second']:,.0f} tokens/{unit(device)}"
            print(f"round {number}: {case}: {speed}", file=sys.stderr)
    return {case: medians(found[case]) for case in cases if case not in failed}, failed


def medians(rounds: list[Figures]) -> dict[str, Any]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} | {"rounds": rounds}


def in_a_process(verb: str, argv: Sequence[str], device: str) -> subprocess.CompletedProcess[str]:
    """The verb on that device, on a CPU with one thread; what it printed."""
    environment = os.environ | {"DS_ACCELERATOR": device}
    if device == "cpu":
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "titans_train", "benchmark", verb, *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def _one(verb: str, argv: Sequence[str], device: str) -> Figures | str:
    """Its figures, or the end of what it said instead."""
    done = in_a_process(verb, argv, device)
    if done.returncode:
        return "\n".join((done.stderr or done.stdout).splitlines()[-8:])
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures
