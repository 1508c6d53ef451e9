"""`benchmark reading`: reading and generating at contexts of 1K to 256K tokens, each block beside full attention.

Of a small model of every block with random weights, in a process of its own on one thread: CPU time per token of
reading (the last piece before the context, read again and again from the state before it) and of generating (token by
token, after so many tokens were read with the carried state), the size of that state, and the peak of resident memory
so far above what the process takes before it reads. Full attention is measured up to a limit: its keys grow with the
context, and the time for reading it with its square.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from titans_train.config import ConfigError, RunConfig, check_config
from titans_train.errors import UserError
from titans_train.host import flush_denormals
from titans_train.inference.sampling import Reading, Sampler, generate, read
from titans_train.models import LanguageModel
from titans_train.models.tree import tensors_of
from titans_train.outputs import check_file
from titans_train.plan import resolve_shape
from titans_train.shape import BLOCKS, ModelShape

CONTEXTS = (1024, 4096, 16384, 65536, 262144)
PIECE = 1024  # tokens read at once
VOCABULARY = 264
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg")  # that matplotlib draws


def shape_of(block: str, options: argparse.Namespace) -> ModelShape:
    """Chunks of 64 tokens; windows and segments of 256. ConfigError: no model has these sizes."""
    sections: dict[str, Any] = {
        "run": {"name": "reading"}, "data": {"path": "none"},
        "model": {"block": block, "layers": options.layers, "width": options.width, "heads": 4,
                  "vocabulary": VOCABULARY},
        "training": {"steps": 1, "sequence_length": 1024, "global_batch_size": 1, "micro_batch_size": 1},
    }  # fmt: skip
    if block != "transformer":
        place = {"lmm": {}, "mac": {"segment": 256}}.get(block, {"window": 256})
        sections |= {"memory": {"chunk_size": 64}, "attention": {"persistent_tokens": 4, **place}}
    config = RunConfig.model_validate(sections)
    if problems := check_config(config):
        raise ConfigError(problems, f"a {block} of --layers {options.layers} and --width {options.width}")
    return resolve_shape(config)


def measure(block: str, contexts: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each context, in rising order: all are places of one text, read once."""
    torch.set_num_threads(1)
    flush_denormals()
    torch.manual_seed(options.seed)
    model = LanguageModel(shape_of(block, options)).eval()
    text = torch.randint(0, 256, (max(contexts),), generator=torch.Generator().manual_seed(options.seed)).tolist()
    _ = list(generate(model, read(model, text[:PIECE]), 2, Sampler(0)))  # allocator and kernels
    before, rows = _resident(), []
    reading: Reading | None = None
    for first in range(0, max(contexts), PIECE):
        end = min(first + PIECE, max(contexts))
        if end not in contexts:
            reading = read(model, text[first:end], reading)
            continue
        ahead, prefill = reading, []
        for _ in range(options.repeats):
            started = time.process_time()
            reading = read(model, text[first:end], ahead)
            prefill.append((time.process_time() - started) / (end - first))
        assert reading is not None
        decode = decoding(model, reading, options.decode)
        rows.append({
            "block": block, "context": end, "prefill_us": 1e6 * statistics.median(prefill),
            "decode_us": 1e6 * statistics.median(decode),
            "state_bytes": sum(t.numel() * t.element_size() for t in tensors_of(reading.state)),
            "peak_bytes": _resident() - before, "parameters": sum(p.numel() for p in model.parameters()),
        })  # fmt: skip
    return rows


def decoding(model: LanguageModel, reading: Reading, count: int) -> list[float]:
    """CPU seconds of each of `count` tokens generated after a reading."""
    seconds, started = [], time.process_time()
    for _ in generate(model, reading, count, Sampler(0)):
        now = time.process_time()
        seconds.append(now - started)
        started = now
    return seconds


def _resident() -> int:
    """Peak of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | context | read, us/token | generate, us/token | state MiB | peak MiB |", "|---|---|---|---|---|---|"]
    for r in rows:
        state, peak = r["state_bytes"] / 2**20, r["peak_bytes"] / 2**20
        times = f"{r['prefill_us']:,.0f} | {r['decode_us']:,.0f}"
        lines.append(f"| {r['block']} | {r['context']:,} | {times} | {state:.2f} | {peak:,.0f} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("prefill_us", 1.0, "reading, us of CPU per token"), ("decode_us", 1.0, "generating, us of CPU per token"),
        ("state_bytes", 2.0**20, "carried state, MiB"),
    )  # fmt: skip
    figure, every = pyplot.subplots(1, 3, figsize=(13, 4))
    for axes, (key, unit, name) in zip(every, panels, strict=True):
        for block in dict.fromkeys(r["block"] for r in rows):
            points = [(r["context"], r[key] / unit) for r in rows if r["block"] == block]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=block)
        axes.set(xscale="log", yscale="log", xlabel="tokens read before (log)", title=name)
        axes.set_xticks(contexts := sorted({r["context"] for r in rows}), [_short(c) for c in contexts])
        axes.set_xticks([], minor=True)
        values = [r[key] / unit for r in rows]
        axes.set_ylim(10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values))))
        axes.grid(alpha=0.3, which="both")
    every[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _short(context: int) -> str:
    return f"{context // 1024}K" if context >= 1024 else str(context)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark reading", description=__doc__)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=["lmm", "mag", "mac", "mal", "transformer"])
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--attention-limit", type=int, default=65536, help="largest context of full attention")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5, help="readings of a piece (the median counts)")
    parser.add_argument("--decode", type=int, default=256, help="tokens generated at each context (the median counts)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--picture", type=Path, help="PNG of the three curves")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # receives the rows of the one block
    options = parser.parse_args(argv)
    for name in ("layers", "width", "repeats", "decode"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}; it is at least 1")
    wrong = [c for c in options.contexts if c < 1 or (c % PIECE and c != max(options.contexts))]
    if wrong:
        raise UserError(
            f"--contexts has {wrong[0]}; all but the largest are multiples of {PIECE}, the tokens of a piece"
        )
    check_file("--json", options.json)
    check_file("--picture", options.picture)
    if options.picture and options.picture.suffix.lower() not in PICTURES:
        raise UserError(f"--picture {options.picture}: its name ends in one of {', '.join(PICTURES)}")
    for block in options.blocks:
        shape_of(block, options)
    if not any(contexts_of(block, options) for block in options.blocks):
        raise UserError(
            f"--contexts are all above --attention-limit {options.attention_limit:,}, and there is no other block; "
            "raise the limit, or give a smaller context"
        )
    return options


def contexts_of(block: str, options: argparse.Namespace) -> list[int]:
    """Those at which a block is measured, in rising order."""
    limit = options.attention_limit if block == "transformer" else max(options.contexts)
    return sorted({c for c in options.contexts if c <= limit})


def main(argv: list[str]) -> int:
    options = _arguments(argv)
    if options.worker:
        (block,) = options.blocks
        options.worker.write_text(json.dumps(measure(block, options.contexts, options)))
        return 0
    rows: list[dict[str, Any]] = []
    for block in options.blocks:
        if contexts := contexts_of(block, options):
            rows += _in_a_process(block, contexts, argv)
    print(table(rows))
    if left := [c for c in options.contexts if c > options.attention_limit and "transformer" in options.blocks]:
        print(f"full attention was measured up to {options.attention_limit:,} tokens; left out: {left}")
    if options.json:
        sizes = {name: getattr(options, name) for name in ("layers", "width", "repeats", "decode", "seed")}
        about = {**sizes, "attention_limit": options.attention_limit, "piece": PIECE, "dtype": "float32", "threads": 1}
        about |= {"torch": torch.__version__, "machine": platform.machine(), "cpus": os.cpu_count()}
        options.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    if options.picture:
        plot(rows, options.picture)
    return 0


def _in_a_process(block: str, contexts: list[int], argv: list[str]) -> list[dict[str, Any]]:
    """RuntimeError with what the process wrote, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        own = ["--blocks", block, "--contexts", *map(str, contexts), "--worker", str(out)]
        command = [sys.executable, "-m", "titans_train", "benchmark", "reading", *argv, *own]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"reading with {block} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows
