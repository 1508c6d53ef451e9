"""Measurements, each a verb of `python -m titans_train benchmark NAME`: ours beside its peers, in one run.

Speeds are process CPU seconds on one thread and medians over rounds, since a machine is rarely quiet.
"""

from __future__ import annotations

import importlib

NAMES = {
    "ablations": "Titans without each of its parts and other papers' models, trained alike: text, recall, needles",
    "checkpoint": "saving and loading beside whole tensors, torch's distributed checkpoint and DeepSpeed's",
    "compare": "two files of figures of one benchmark: ratios, and what has become worse",
    "data": "reading beside plain numpy, waits, start-up, memory; preparing beside the tokenizer alone",
    "faults": "a tiny run struck in every way that happens to runs: survived, steps lost, time to detect",
    "layers": "blocks side by side on a CPU or a GPU: ours, Transformer++, Gated DeltaNet, titans-pytorch",
    "memory": "the memory's speed and peak memory beside titans-pytorch, autograd and a Transformer++ block",
    "layouts": "collectives and peak memory of each layout beside the plan",
    "model": "whole training steps beside the Transformer of the same size: tokens/s, MFU, memory, time by part",
    "parity": "gradients and parameters under tensor, sequence and data parallelism and ZeRO against one process",
    "profile": "training steps of a config: a trace for Perfetto, and self time by group of operators",
    "reading": "time per token of reading and generating, state and memory, at contexts of 1K to 256K tokens",
    "roofline": "FLOPs, bytes and launches of the memory, and the floors that they imply on this device",
    "sequence": "sequence shards: schedules simulated, waits and real work measured, memory, very long sequences",
    "stability": "every block for 300 steps with a row of equal tokens",
}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in NAMES:
        lines = "\n".join(f"  {name:10} {text}" for name, text in NAMES.items())
        print(f"usage: python -m titans_train benchmark NAME [options]\n\n{lines}")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    return int(importlib.import_module(f"titans_train.benchmark.{argv[0]}").main(argv[1:]))
