"""`benchmark sequence PART`: sequence shards - what a schedule can reach, and what real processes reach.

schedule   a wavefront of any size simulated from times per piece, and drawn
waits      the real messages on real processes, with sleeps where a rank would compute, beside the simulation
compute    real scans and LMM blocks: shards on some processes against the whole sequence in one; both strategies
memory     peak of tensors per rank in a training step, at the same tokens per rank, as ranks are added
long       training steps on one very long sequence: loss, time, memory
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from titans_train.benchmark.processes import report, rows_of
from titans_train.benchmark.schedule import Job, Times, draw, predicted_time, simulate
from titans_train.shape import BLOCKS

ENOUGH = 0.9  # of the simulated efficiency is the aim of `waits`
FLAT = 0.05  # of one rank's peak: what `memory` may differ by
Row = dict[str, Any]


@dataclass(frozen=True)
class Waits:
    """A stack of layers on a rank: the part before the scan, the scan's pieces, the part after, all of them sleeps."""

    ranks: int
    layers: int
    pieces: int
    micro_batches: int
    wave: int
    forward_ms: float  # of a layer
    backward_ms: float
    share: float  # of a layer's time that is scan; the rest is half before it and half after
    repetitions: int

    def job(self, latency: float = 0.0, overhead: float = 0.0) -> Job:
        """latency: of a message; overhead: of a piece beyond its sleep; in seconds."""

        def times(layer: float) -> Times:
            beside = (1 - self.share) / 2 * layer / 1e3
            return Times(beside, self.share * layer / 1e3 / self.pieces + overhead, beside, latency)

        forward, backward = times(self.forward_ms), times(self.backward_ms)
        return Job(self.layers, self.ranks, self.pieces, self.micro_batches, self.wave, forward, backward)


@dataclass(frozen=True)
class Compute:
    """Layers one after the other, forward and backward, on `tokens` tokens of each of `batch` sequences."""

    ranks: int
    level: str  # "operator": scans alone; "block": LMM blocks
    strategy: str
    depth: int
    norm: bool
    pieces: int
    layers: int
    tokens: int
    batch: int
    heads: int
    head_dim: int
    chunk: int
    rounds: int


@dataclass(frozen=True)
class Training:
    """Steps of a small model on one sequence of random tokens."""

    ranks: int
    block: str
    tokens: int  # of the whole sequence
    steps: int
    layers: int
    width: int
    heads: int
    chunk: int
    vocabulary: int
    zero: int
    pieces: int | None
    checkpointing: bool
    counted: bool  # tensors are counted in the first step, which takes longer for it


# ---- schedule


def schedule(args: argparse.Namespace) -> int:
    forward = Times(args.before / 1e3, args.piece / 1e3, args.after / 1e3, args.latency / 1e3)
    b = args.backward_factor
    recompute = args.recompute / 1e3
    backward = Times(b * forward.before, b * forward.piece + recompute, b * forward.after, forward.latency, recompute)
    shape = (args.layers, args.shards, args.pieces, args.micro_batches, args.wave)
    job = Job(*shape, forward, backward, args.barrier)
    found = simulate(job)
    figures = {
        "makespan_ms": 1e3 * found.makespan, "work_ms": 1e3 * job.work, "efficiency": found.efficiency,
        "closed_form_ms": 1e3 * predicted_time(job), "idle_ms_by_rank": [1e3 * seconds for seconds in found.idle],
    }  # fmt: skip
    lines = ["| | |", "|---|---|", f"| makespan | {1e3 * found.makespan:,.1f} ms |"]
    lines += [
        f"| closed form | {1e3 * predicted_time(job):,.1f} ms |",
        f"| work on each rank | {1e3 * job.work:,.1f} ms |",
        f"| efficiency | {100 * found.efficiency:.1f} % |",
        f"| idle, by rank | {', '.join(f'{1e3 * seconds:.1f}' for seconds in found.idle)} ms |",
    ]
    if args.picture is not None:
        names = ("layers", "shards", "pieces", "micro-batches")
        size = ", ".join(f"{n} {name}" for n, name in zip(shape, names, strict=False))
        draw(found, args.picture, f"{size} in waves of {job.wave}")
    given = {name: value for name, value in vars(args).items() if isinstance(value, int | float)}
    return report([{**given, **figures}], "\n".join(lines), args.json, [], "")


# ---- waits


def waits_of(args: argparse.Namespace) -> list[Waits]:
    """Every wave for layers that are all scan; for other shares the shortest only."""
    layouts = []
    for share, micro, wave, pieces in product(args.shares, args.micro_batches, args.waves, args.pieces):
        if wave > micro or (share != args.shares[0] and micro != min(args.micro_batches)):
            continue
        layouts.append(
            Waits(
                args.ranks, args.layers, pieces, micro, wave, args.forward, args.backward, share, args.repetitions
            )  # fmt: skip
        )
    return layouts


def beside_simulation(layout: Waits, row: Row) -> Row:
    """Adds what follows from the measured seconds."""
    work, steps = layout.job().work, 2 * layout.micro_batches * layout.layers * layout.pieces
    latency, cpu, measured = row["latency_us"] / 1e6, row["cpu"] / steps, work / row["makespan"]
    plain, late, slow = (simulate(layout.job(*of)) for of in ((), (latency,), (latency, cpu)))
    return row | {
        "work": work, "efficiency": measured, "simulated_without_latency": plain.efficiency,
        "simulated": late.efficiency, "ratio": measured / late.efficiency,
        "simulated_with_cpu": work / slow.makespan, "cpu_ms": 1e3 * cpu,
        "overhead_ms": 1e3 * (row["alone"] - work) / steps,
    }  # fmt: skip


def waits(args: argparse.Namespace) -> int:
    layouts = waits_of(args)
    found = rows_of("sequence", layouts, part="waits", patience=args.patience)
    rows = [beside_simulation(layout, row) for layout, row in zip(layouts, found, strict=True)]
    lines = [
        "| scan, of a layer | micro-batches | wave | pieces | of ms, forward + backward | makespan, s | measured, % "
        "| simulated, % | measured / simulated | message, us | CPU of a piece, ms | simulated with that CPU, % "
        "| overhead of a piece alone, ms | cores others used |",
        "|---" * 14 + "|",
    ]
    for r in rows:
        piece = [r["share"] * r[k] / r["pieces"] for k in ("forward_ms", "backward_ms")]
        lines.append(
            f"| {r['share']:.0%} | {r['micro_batches']} | {r['wave']} | {r['pieces']} | {piece[0]:g} + {piece[1]:g} "
            f"| {r['makespan']:.3f} | {100 * r['efficiency']:.1f} | {100 * r['simulated']:.1f} | {r['ratio']:.3f} "
            f"| {r['latency_us']:.0f} | {r['cpu_ms']:.2f} | {100 * r['simulated_with_cpu']:.1f} "
            f"| {r['overhead_ms']:.2f} | {r['others']:.2f} |"
        )
    lines += [
        "",
        f"{args.layers} layers, {args.ranks} ranks. measured: the sleeps of a rank / wall time, median of "
        f"{args.repetitions}. simulated: with the measured time of a message. CPU: of a rank's main thread, everything "
        "but sleeps, shared out over pieces. overhead: what a piece takes beyond its sleep when all ranks run at once "
        "without messages.",
    ]
    return report(rows, "\n".join(lines), args.json, [r for r in rows if r["ratio"] < ENOUGH], "below the aim")


# ---- compute


def compute_of(args: argparse.Namespace) -> list[Compute]:
    kinds = [("wavefront", 2, True, args.pieces), ("wavefront", 1, False, args.pieces), ("affine", 1, False, [1])]
    return [
        Compute(
            args.ranks, level, strategy, depth, norm, pieces, args.layers, args.tokens, args.batch, args.heads,
            args.head_dim, args.chunk, args.rounds,
        )
        for level in args.levels for strategy, depth, norm, choices in kinds if strategy in args.strategies
        for pieces in choices
    ]  # fmt: skip


def compute(args: argparse.Namespace) -> int:
    rows = rows_of("sequence", compute_of(args), part="compute", patience=args.patience)
    lines = [
        "| level | strategy | memory | pieces | 1 process, s | shards, s | speed-up | predicted | without messages "
        "| sent by a rank and layer, forward; backward | cores others used |",
        "|---" * 11 + "|",
    ]
    for r in rows:
        memory = f"depth {r['depth']}{', norm' if r['norm'] else ''}"
        lines.append(
            f"| {r['level']} | {r['strategy']} | {memory} | {r['pieces']} | {r['whole']:.2f} | {r['sharded']:.2f} "
            f"| {r['speed_up']:.2f} | {r['predicted']:.2f} | {r['ceiling']:.2f} "
            f"| {_sent(r['forward_bytes'])}; {_sent(r['backward_bytes'])} | {r['others']:.2f} |"
        )
    lines += [
        "",
        f"{args.layers} layers, {args.batch} x {args.tokens} tokens, {args.heads} heads of {args.head_dim}, chunk "
        f"{args.chunk}, fp32; {args.ranks} ranks x 1 thread against 1 process x 1 thread; medians of {args.rounds} "
        "rounds in turn. without messages: every rank works on its part as if it were alone, the most that these "
        "cores give. predicted: ranks x the plan's efficiency, from counts of products.",
    ]
    return report(rows, "\n".join(lines), args.json, [r for r in rows if r["loss_apart"] > 1e-3], "another loss")


def _sent(messages: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 1024:,.1f} KiB" for name, size in messages.items()) or "nothing"


# ---- memory, long


def memory(args: argparse.Namespace) -> int:
    layouts = [
        Training(
            ranks, block, args.tokens * ranks, 2, args.layers, args.width, args.heads, args.chunk, args.vocabulary,
            0, args.pieces, args.checkpointing, True,
        )
        for block in args.blocks for ranks in args.ranks
    ]  # fmt: skip
    rows = rows_of("sequence", layouts, part="memory")
    first = {r["block"]: r["peak"] for r in rows if r["ranks"] == min(args.ranks)}
    rows = [r | {"relative": r["peak"] / first[r["block"]]} for r in rows]
    rows.sort(key=lambda r: (args.blocks.index(r["block"]), r["ranks"]))
    lines = [
        f"| block | ranks | tokens | peak of a rank, MiB | of {min(args.ranks)} rank's | by rank, MiB "
        "| of these model and Adam, MiB | pieces |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        by_rank = ", ".join(f"{peak / 2**20:.1f}" for peak in r["peaks"])
        lines.append(
            f"| {r['block']} | {r['ranks']} | {r['tokens']} | {r['peak'] / 2**20:.1f} | {r['relative']:.3f} "
            f"| {by_rank} | {r['fixed'] / 2**20:.1f} | {r['pieces_used']} |"
        )
    return report(rows, "\n".join(lines), args.json, [r for r in rows if r["relative"] > 1 + FLAT], "not flat")


def long(args: argparse.Namespace) -> int:
    layout = Training(
        args.ranks, args.block, args.tokens, args.steps, args.layers, args.width, args.heads, args.chunk,
        args.vocabulary, args.zero, args.pieces, args.checkpointing, not args.uncounted,
    )  # fmt: skip
    rows = rows_of("sequence", [layout], part="long")
    (r,) = rows
    lines = ["| step | loss | seconds | tokens per second |", "|---|---|---|---|"]
    for n, (loss, seconds) in enumerate(zip(r["losses"], r["seconds"], strict=True)):
        note = " (tensors counted)" if n == 0 and layout.counted else ""
        lines.append(f"| {n + 1} | {loss:.4f} | {seconds:.2f}{note} | {r['tokens'] / seconds:,.0f} |")
    lines += [
        "",
        "| rank | peak of tensors, MiB | peak resident, MiB | of these before the first step |",
        "|---" * 4 + "|",
    ]
    for rank, (peak, resident, before) in enumerate(zip(r["peaks"], r["resident"], r["resident_before"], strict=True)):
        tensors = f"{peak / 2**20:,.0f}" if layout.counted else ""
        lines.append(f"| {rank} | {tensors} | {resident / 2**20:,.0f} | {before / 2**20:,.0f} |")
    lines += ["", f"{r['block']}, {r['parameters']:,} parameters, {r['tokens']:,} tokens on {r['ranks']} ranks, "
                  f"{r['strategy']}, {r['pieces_used']} pieces"]  # fmt: skip
    wrong = [r for loss in r["losses"] if not abs(loss) < float("inf")]
    return report(rows, "\n".join(lines), args.json, wrong, "a loss that is no number")


# ---- the command line


def _model_options(parser: argparse.ArgumentParser, width: int, vocabulary: int, layers: int) -> None:
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--heads", type=int, default=width // 64 if width > 64 else 2)
    parser.add_argument("--chunk", type=int, default=64, help="tokens (MAC's segment and windows are 4 chunks)")
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--pieces", type=int, help="of a scan (default: the plan chooses)")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")


def parser_of_parts() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m titans_train benchmark sequence", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parts = parser.add_subparsers(required=True, metavar="PART")

    def part(run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        one = parts.add_parser(run.__name__)
        one.set_defaults(run=run)
        one.add_argument("--json", type=Path, help="file for all rows")
        return one

    one = part(schedule)
    for name, default in {"layers": 24, "shards": 8, "pieces": 4, "micro-batches": 1, "wave": 1}.items():
        one.add_argument(f"--{name}", type=int, default=default)
    for name, ms in {"before": 0.0, "piece": 8.0, "after": 0.0, "latency": 0.0}.items():
        one.add_argument(f"--{name}", type=float, default=ms, help="ms, forward")
    one.add_argument("--backward-factor", type=float, default=2.0, help="backward / forward, of every part")
    one.add_argument("--recompute", type=float, default=0.0, help="ms that a piece's backward adds before its wait")
    one.add_argument("--barrier", action="store_true", help="all ranks meet in every layer")
    one.add_argument("--picture", type=Path, help="file for the Gantt chart, PNG")
    _waits_options(part(waits))
    _compute_options(part(compute))
    one = part(memory)
    one.add_argument("--blocks", nargs="+", default=["lmm", "mag", "mal", "mac"], choices=BLOCKS)
    one.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    one.add_argument("--tokens", type=int, default=2048, help="of a rank")
    _model_options(one, width=256, vocabulary=2000, layers=2)
    one = part(long)
    one.add_argument("--block", default="lmm", choices=BLOCKS)
    one.add_argument("--tokens", type=int, default=65536, help="of the whole sequence")
    one.add_argument("--ranks", type=int, default=4)
    one.add_argument("--steps", type=int, default=2)
    one.add_argument("--zero", type=int, default=1, choices=[0, 1, 2, 3])
    one.add_argument("--uncounted", action="store_true", help="count no tensors, which takes time in the first step")
    _model_options(one, width=64, vocabulary=256, layers=2)
    return parser


PATIENCE = "seconds that a row may be measured again for, while other programs keep cores busy"


def _waits_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--ranks", type=int, default=8)
    one.add_argument("--layers", type=int, default=24)
    one.add_argument("--pieces", nargs="+", type=int, default=[1, 2, 4, 8])
    one.add_argument("--micro-batches", nargs="+", type=int, default=[1, 4])
    one.add_argument("--waves", nargs="+", type=int, default=[1, 4])
    one.add_argument("--forward", type=float, default=32.0, help="ms of a layer")
    one.add_argument("--backward", type=float, default=64.0, help="ms of a layer")
    one.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.4], help="of a layer that is scan")
    one.add_argument("--repetitions", type=int, default=3)
    one.add_argument("--patience", type=float, default=0.0, help=PATIENCE)


def _compute_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--levels", nargs="+", default=["operator", "block"], choices=["operator", "block"])
    one.add_argument("--strategies", nargs="+", default=["wavefront", "affine"], choices=["wavefront", "affine"])
    one.add_argument("--pieces", nargs="+", type=int, default=[1, 2])
    one.add_argument("--patience", type=float, default=0.0, help=PATIENCE)
    sizes = {"ranks": 2, "layers": 8, "tokens": 4096, "batch": 2, "heads": 4, "head-dim": 64, "chunk": 64, "rounds": 3}
    for name, default in sizes.items():
        one.add_argument(f"--{name}", type=int, default=default)


def main(argv: list[str]) -> int:
    if argv[:1] == ["--worker"]:
        from titans_train.benchmark.sequence_worker import work

        work(Path(argv[1]))
        return 0
    args = parser_of_parts().parse_args(argv)
    return int(args.run(args))
