"""`benchmark roofline`: the least time that the memory's forward and backward can take, and what bounds it.

For each size of a model, hidden expansion and chunk: FLOPs, bytes and launches per token of the recurrence, of the dual
form in plain PyTorch (both counted on the meta device, each operator by itself), of the compiled scan (products as it
counts them) and of the Triton kernels (by the products and passes that they are written with); and the floors that
these imply with this device's ceilings, measured here: matmul rate, bandwidth of memory, bandwidth of the cache, time
of a launch. None of these grows with the length but by the token, so that a length only decides how many rows there are
to fill a device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from titans_train.benchmark import record
from titans_train.benchmark.counts import compiled_work, count, operator
from titans_train.benchmark.device import check, matmul_rate, seconds
from titans_train.memory.kernels import compiled
from titans_train.outputs import check_file
from titans_train.shape import beyond_kernels, part_tokens, triton_tokens

SIZES = {"340M": (16, 64), "760M": (16, 96), "1.3B": (8, 256)}  # heads, width of a head
EXPANSIONS, CHUNKS, LENGTHS = (2, 4), (16, 64, 256, 1024), (4096, 16384, 65536)
STORE_EVERY = 16
CACHE = 32 << 20  # bytes of states and adjoints that stay there


@dataclass(frozen=True)
class Ceilings:
    """Of a device. FLOPs, bytes, bytes and seconds per second and launch."""

    matmul: float
    memory: float
    cache: float
    launch: float


@dataclass(frozen=True)
class Work:
    """Per token and head; launches are of all rows together, so per token of a row."""

    flops: float
    memory: float  # bytes
    cache: float  # bytes that stay in the cache while a chunk is worked on
    launches: float

    def floors(self, heads: int, rows: int, at: Ceilings) -> dict[str, float]:
        """Seconds per token of `rows` sequences."""
        return {
            "matmul": heads * self.flops / at.matmul, "bytes": heads * self.memory / at.memory,
            "cache": heads * self.cache / at.cache, "launches": self.launches * at.launch / rows,
        }  # fmt: skip


def state_bytes(d: int, hidden: int) -> int:
    """Of a head: W1, W2, S1, S2 in float32."""
    return 4 * 4 * d * hidden


def token_bytes(d: int, chunk: int, item: int) -> float:
    """What no way can leave: q, k, v, y and their gradients, of the model's dtype, the gates' coefficients."""
    return item * d * (4 + 2 + 4) + 4 * 3 * d + 4 * (chunk + 2) * 2 * 3


def segment(chunk: int) -> int:
    """Chunks between two states that are kept, as the plan chooses."""
    return min(STORE_EVERY, max(1, 1024 // chunk))


def counted(how: str, d: int, hidden: int, chunk: int, item: int, cached: bool) -> Work:
    """Of a head, each call by itself; its operands come from the cache if all that is worked on fits there. The
    recurrence is the same for every chunk."""
    length = 64 if how == "recurrence" else chunk * segment(chunk)
    found = count(operator(how, 1, d, hidden, chunk if how == "dual" else 64, length)).per(length)
    tokens = token_bytes(d, chunk, item)
    memory, cache = (tokens, found.bytes) if cached else (tokens + found.bytes, 0.0)
    return Work(found.flops, memory, cache, found.calls)


def of_triton(d: int, hidden: int, chunk: int, item: int) -> Work:
    """Depth 2 with momentum, forgetting and norm.

    A chunk of more than T tokens is walked over in parts of T. Products: 24 d h forward, 16 to recompute the states, 58
    backward, and of T x T matrices. Memory: the states kept once per segment and those of its parts, written and read.
    Cache: the passes over the state (10, 14 and 24 of its d h; 5 more over the anchor, where it is not the state), the
    tiles' numbers (15 of T h).
    """
    tokens = part_tokens(chunk, triton_tokens(d, exact=item == 4))
    between = segment(chunk) * chunk
    products = 98 * d * hidden + tokens * (16 * hidden + 16 * d)
    memory = token_bytes(d, tokens, item) + state_bytes(d, hidden) * (2 / between + 2 / tokens)
    passes = 4 * d * hidden * (10 + 14 + 24 + (5 if tokens < chunk else 0)) / tokens
    return Work(products, memory, passes + 4 * 15 * hidden, 5 / between)


def of_compiled(d: int, hidden: int, chunk: int) -> Work:
    """The same in float32, a row at a time: products as they are counted. Memory: the states that are kept, and the
    adjoints, once per segment. Cache: each product's matrix of d h (59 with what is written back), 40 of T h.
    """
    chunks, tokens = segment(chunk), part_tokens(chunk, least=compiled.LEAST_TOKENS)
    _, flops = compiled_work(operator("compiled", 1, d, hidden, chunk, chunk * chunks, chunks))
    memory = token_bytes(d, tokens, 4) + state_bytes(d, hidden) * 6 / (chunks * chunk)
    return Work(flops / (chunks * chunk), memory, 4 * (59 * d * hidden / tokens + 40 * hidden), 2 / (chunks * chunk))


def _seconds(run: Callable[[], object], device: str) -> float:
    """Of one call."""
    seconds(run, device, 3)
    return seconds(run, device, 20)


def measured(device: str) -> Ceilings:
    """Matmul: of the dtype that products have there (TF32 on a GPU, float32 on a CPU)."""
    large, small = (1 << 30, 16 << 20) if device == "cuda" else (256 << 20, 1 << 19)
    torch.backends.cuda.matmul.allow_tf32 = True

    def copying(size: int) -> float:
        source, to = (torch.randn(size // 4, device=device) for _ in range(2))
        return 2 * size / _seconds(lambda: to.copy_(source), device)

    one = torch.zeros(1, device=device)
    return Ceilings(
        matmul_rate(device, torch.float32), copying(large), copying(small), _seconds(lambda: one.add_(1), device)
    )


def rows_of(options: argparse.Namespace, at: Ceilings) -> list[dict[str, Any]]:
    found = []
    for size in options.sizes:
        heads, d = SIZES[size]
        for expansion in options.expansions:
            hidden = expansion * d
            for chunk in options.chunks:
                cached = 2 * heads * options.rows * state_bytes(d, hidden) <= CACHE
                kinds = {how: counted(how, d, hidden, chunk, options.item, cached) for how in ("recurrence", "dual")}
                if options.device == "cpu" and compiled.why_not() is None:
                    kinds["compiled"] = of_compiled(d, hidden, chunk)
                if not beyond_kernels(2, chunk, d, exact=options.item == 4):
                    kinds["triton"] = of_triton(d, hidden, chunk, options.item)
                for how, work in kinds.items():
                    floors = work.floors(heads, options.rows, at)
                    bound = max(floors, key=floors.__getitem__)
                    found.append({
                        "size": size, "hidden": hidden, "chunk": chunk, "how": how, **asdict(work), "floors": floors,
                        "bound": bound, "seconds": {str(n): n * options.rows * floors[bound] for n in LENGTHS},
                    })  # fmt: skip
    return found


def name_of(row: dict[str, Any]) -> str:
    return f"{row['size']}, hidden {row['hidden']}, chunk {row['chunk']}, {row['how']}"


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| size | hidden | chunk | | MFLOP | KiB, memory | KiB, cache | launches | floor, µs | bound by |"]
    lines.append("|---" * 10 + "|")
    for r in found:
        floor = max(r["floors"].values()) * 1e6
        lines.append(
            f"| {r['size']} | {r['hidden']} | {r['chunk']} | {r['how']} | {r['flops'] / 1e6:.2f} | "
            f"{r['memory'] / 1024:,.1f} | {r['cache'] / 1024:,.1f} | {r['launches']:.3f} | {floor:,.3f} | "
            f"{r['bound']} |"
        )
    return "\n".join(lines)


def draw(found: list[dict[str, Any]], at: Ceilings, path: Path) -> None:
    """FLOPs per byte of memory against the rate that this allows, under the device's roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    edge = at.matmul / at.memory
    x = [edge / 1000, edge, edge * 1000]
    axes.plot(x, [min(at.matmul, i * at.memory) / 1e9 for i in x], color="black", label="memory bandwidth, matmul rate")
    for how, marker in (("recurrence", "s"), ("dual", "o"), ("compiled", "x"), ("triton", "^")):
        rows = [r for r in found if r["how"] == how]
        if rows:
            heads = [SIZES[r["size"]][0] for r in rows]
            rates = [h * r["flops"] / max(r["floors"].values()) / 1e9 for h, r in zip(heads, rows, strict=True)]
            axes.scatter([r["flops"] / r["memory"] for r in rows], rates, marker=marker, label=how, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of memory", ylabel="GFLOP/s at the floor")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m titans_train benchmark roofline", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--expansions", nargs="+", type=int, default=list(EXPANSIONS))
    parser.add_argument("--chunks", nargs="+", type=int, default=list(CHUNKS))
    parser.add_argument("--rows", type=int, default=1, help="sequences at a time")
    parser.add_argument("--item", type=int, default=2, choices=[2, 4], help="bytes of a number of the model's dtype")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--picture", type=Path, help="file for a picture")
    options = parser.parse_args(argv)
    for path in (options.json, options.picture):
        check_file("--json or --picture", path)
    check(options.device)
    torch.set_num_threads(1)
    at = measured(options.device)
    print(f"matmul {at.matmul / 1e9:,.0f} GFLOP/s, memory {at.memory / 1e9:,.1f} GB/s, "
          f"cache {at.cache / 1e9:,.1f} GB/s, launch {at.launch * 1e6:.1f} µs")  # fmt: skip
    found = rows_of(options, at)
    print(table(found))
    if options.json:
        dtype = {2: "bfloat16", 4: "float32"}[options.item]
        what = record.about("roofline", argv, options.device, dtype, rows=options.rows, ceilings=asdict(at))
        record.write(options.json, what, {name_of(r): r for r in found})
    if options.picture:
        draw(found, at, options.picture)
    return 0
