"""What a wavefront over sequence shards can reach: its schedule simulated, predicted and drawn.

    P shards (ranks), N layers, M micro-batches in waves of K, G pieces per scan
    f, b: a whole layer forward and backward; p_f, p_b: one piece; r: the recomputed part of p_b; c_f, c_b: latency

A layer is "before" the scan (projections), the scan, and "after" it (output, FFN). Its forward runs before, pieces
0..G-1, after; its backward runs after, pieces G-1..0, before. A piece starts when the same piece of the left rank (in
the backward: of the right rank) is done and its state has arrived. A wave is K forwards, then their backwards, the last
micro-batch first. Messages never block their sender nor share a link, and every rank takes the same time for a part.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["forward", "backward"]
Part = Literal["before", "scan", "after"]


@dataclass(frozen=True)
class Times:
    """A layer on one rank in one direction, in seconds. In the backward, `before` is still the part before the scan."""

    before: float
    piece: float
    """One of the scan's G pieces, `recompute` included."""
    after: float
    latency: float = 0.0
    """From the end of a piece until the neighbour holds its state."""
    recompute: float = 0.0
    """Backward only: the share of `piece` that needs no state gradient, hence runs before the wait for it."""

    def layer(self, pieces: int) -> float:
        """Work in a whole layer, in seconds, without waits."""
        return self.before + pieces * self.piece + self.after


@dataclass(frozen=True)
class Job:
    layers: int
    shards: int
    pieces: int
    """G: pieces per scan."""
    micro_batches: int
    wave: int
    """K: micro-batches forwarded before their backwards; the last wave may be smaller."""
    forward: Times
    backward: Times
    barrier: bool = False
    """All ranks wait for each other at the start of every layer, in both directions (ZeRO-3 without prefetch)."""

    def __post_init__(self) -> None:
        for name in ("layers", "shards", "pieces", "micro_batches", "wave"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}, must be at least 1")
        for kind, times in (("forward", self.forward), ("backward", self.backward)):
            for name, seconds in vars(times).items():
                if not 0 <= seconds < math.inf:
                    raise ValueError(f"{kind}.{name} = {seconds} s, must be finite and not negative")
            if times.recompute >= times.piece:
                raise ValueError(f"{kind}.piece = {times.piece} s, must exceed its recompute = {times.recompute} s")
        if self.forward.recompute:
            raise ValueError(f"forward.recompute = {self.forward.recompute} s: only a backward recomputes, set it to 0")

    @property
    def work(self) -> float:
        """M N (f + b): seconds of work, the same on every rank."""
        return self.micro_batches * self.layers * (self.forward.layer(self.pieces) + self.backward.layer(self.pieces))


@dataclass(frozen=True)
class Event:
    """Work without a pause on one rank. A part that takes no time has no event; with `recompute`, a piece of the
    backward has two: the recomputation, then, once the state gradient has arrived, the rest."""

    rank: int
    start: float  # seconds since the job's start
    stop: float
    kind: Kind
    part: Part
    micro_batch: int
    layer: int
    piece: int | None  # in the scan only


@dataclass(frozen=True)
class Schedule:
    events: list[Event]  # each rank's in order of time
    job: Job

    @property
    def makespan(self) -> float:
        """Seconds from the first start on any rank to the last stop on any rank."""
        return max(event.stop for event in self.events)

    @property
    def efficiency(self) -> float:
        """Work per rank / makespan, 0 to 1."""
        return self.job.work / self.makespan

    @property
    def idle(self) -> list[float]:
        """Seconds without work, per rank. All are equal, since all ranks have the same work."""
        busy = [math.fsum(e.stop - e.start for e in self.events if e.rank == r) for r in range(self.job.shards)]
        return [self.makespan - seconds for seconds in busy]


def simulate(job: Job) -> Schedule:
    """Every rank works in its fixed order and as early as its states allow."""
    events: list[Event] = []
    clock = [0.0] * job.shards  # when each rank is free

    def layer(kind: Kind, micro_batch: int, index: int) -> None:
        def work(rank: int, part: Part, seconds: float, piece: int | None = None) -> None:
            start, clock[rank] = clock[rank], clock[rank] + seconds
            if seconds:
                events.append(Event(rank, start, clock[rank], kind, part, micro_batch, index, piece))

        if job.barrier:
            clock[:] = [max(clock)] * job.shards
        times, step = (job.forward, 1) if kind == "forward" else (job.backward, -1)
        ends: tuple[Part, Part] = ("before", "after")
        first, last = ends[::step]
        # Within a layer states go one way only, so rank after rank in that direction sees every arrival in time.
        arrival = [0.0] * job.pieces
        for rank in range(job.shards)[::step]:
            work(rank, first, getattr(times, first))
            for piece in range(job.pieces)[::step]:
                work(rank, "scan", times.recompute, piece)
                clock[rank] = max(clock[rank], arrival[piece])
                work(rank, "scan", times.piece - times.recompute, piece)
                arrival[piece] = clock[rank] + times.latency
            work(rank, last, getattr(times, last))

    for start in range(0, job.micro_batches, job.wave):
        batches = range(start, min(start + job.wave, job.micro_batches))
        for micro_batch in batches:
            for index in range(job.layers):
                layer("forward", micro_batch, index)
        for micro_batch in reversed(batches):
            for index in reversed(range(job.layers)):
                layer("backward", micro_batch, index)
    return Schedule(events, job)


def predicted_time(job: Job) -> float:
    """The makespan in closed form, in seconds: work + lags * (P - 1) * (p_f + c_f + p_b - r + c_b).

    A rank's first wait puts it one piece and one message behind its neighbour. From then on each state arrives just
    when it is needed, however long the other parts are, so the lag is paid once per direction and wave: ceil(M / K)
    times. A barrier takes the lag back, so that every layer pays it anew: M * N times. What is recomputed before the
    wait adds no lag. Equal to `simulate` but for rounding, in every job; approximate for what neither knows: ranks or
    pieces of unequal speed, sends that block, collectives other than `barrier`.
    """
    lag = job.forward.piece + job.forward.latency
    lag += job.backward.piece - job.backward.recompute + job.backward.latency
    lags = job.micro_batches * job.layers if job.barrier else math.ceil(job.micro_batches / job.wave)
    return job.work + lags * (job.shards - 1) * lag


# By micro-batch, even and odd: a scan, the rest of a layer, both merged.
COLOURS = {
    ("forward", 0): ("#1b4b91", "#9dbde8", "#5080c8"),
    ("forward", 1): ("#2a86b8", "#b5e0f2", "#78bce0"),
    ("backward", 0): ("#b84300", "#f7b184", "#e57a30"),
    ("backward", 1): ("#b87700", "#fbd88c", "#f3b545"),
}
WIDTH, DPI = 16, 120  # inches, pixels per inch
PLOT = 0.92 * WIDTH * DPI  # pixels between the axes, about
CHARACTER = 7.5  # pixels, of the font used for labels


def draw(schedule: Schedule, path: Path, title: str) -> None:
    """A Gantt chart as PNG: a row per rank, forward blue, backward orange, scans dark, idle white.

    Draws single pieces, labelled layer.piece where that fits; if too narrow, whole scans; else whole micro-batches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    job, pixels = schedule.job, PLOT / schedule.makespan  # per second
    bars, detail = _bars(schedule, pixels)
    figure, axes = pyplot.subplots(figsize=(WIDTH, 1.5 + 0.5 * job.shards))
    label: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    rows: defaultdict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    widest = CHARACTER * len(f"{job.layers - 1}.{job.pieces - 1}")
    for event in bars:
        dark, light, merged = COLOURS[event.kind, event.micro_batch % 2]
        colour = merged if detail == "micro-batches" else dark if event.part == "scan" else light
        rows[event.rank, colour].append((1e3 * event.start, 1e3 * (event.stop - event.start)))
        if detail == "pieces" and event.part == "scan" and (event.stop - event.start) * pixels > widest:
            text = f"{event.layer}.{event.piece}"
            axes.text(500 * (event.start + event.stop), event.rank, text, color="white", **label)
    for (rank, colour), spans in rows.items():
        edges = [0.6 if 1e-3 * width * pixels > 8 else 0 for _, width in spans]
        axes.broken_barh(spans, (rank - 0.3, 0.6), facecolor=colour, edgecolor="white", linewidth=edges)
    # Above each row: which micro-batch. Waits do not end it. All labels take the longest form that fits everywhere.
    batches = _merge(schedule.events, lambda e: (e.kind, e.micro_batch), math.inf)
    for form in ("{0.kind} of micro-batch {0.micro_batch}", "{0.kind} {0.micro_batch}", "{0.micro_batch}"):
        if all(CHARACTER * len(form.format(e)) < (e.stop - e.start) * pixels for e in batches):
            for e in batches:
                colour = COLOURS[e.kind, e.micro_batch % 2][0]
                axes.text(500 * (e.start + e.stop), e.rank - 0.41, form.format(e), color=colour, **label)
            break
    shown = {
        "pieces": "dark: scan pieces, layer.piece; light: rest of the layer",
        "scans": "dark: scans; light: rest of the layer",
        "micro-batches": "bars: layers of a micro-batch, merged between waits",
    }
    legend = [Patch(color=COLOURS[kind, 0][2], label=kind) for kind in ("forward", "backward")]
    legend += [Patch(facecolor="white", edgecolor="gray", label="idle"), Patch(alpha=0, label=shown[detail])]
    figure.legend(handles=legend, loc="lower right", ncols=4, fontsize=8, frameon=False)
    axes.set(xlabel="time (ms)", xlim=(0, 1e3 * schedule.makespan), ylim=(job.shards - 0.5, -0.6))
    axes.set_yticks(range(job.shards), [f"rank {rank}" for rank in range(job.shards)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"{title}: efficiency {100 * schedule.efficiency:.1f} %", loc="left")
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _bars(schedule: Schedule, pixels: float) -> tuple[list[Event], str]:
    """The finest bars a person can tell apart at `pixels` per second, and what each of them is."""
    job, gap = schedule.job, 1e-9 * schedule.makespan  # rounding is no wait
    if min(job.forward.piece, job.backward.piece) * pixels > 8:
        return _merge(schedule.events, lambda e: (e.kind, e.micro_batch, e.layer, e.part, e.piece), gap), "pieces"
    if min(job.forward.layer(job.pieces), job.backward.layer(job.pieces)) * pixels > 8:
        return _merge(schedule.events, lambda e: (e.kind, e.micro_batch, e.layer, e.part), gap), "scans"
    return _merge(schedule.events, lambda e: (e.kind, e.micro_batch), gap), "micro-batches"


def _merge(events: list[Event], key: Callable[[Event], Hashable], gap: float) -> list[Event]:
    """One event for each run of a rank's events with equal key and at most `gap` seconds between them."""
    runs: list[Event] = []
    for event in sorted(events, key=lambda e: (e.rank, e.start)):
        last = runs[-1] if runs else None
        if last and last.rank == event.rank and key(last) == key(event) and event.start - last.stop <= gap:
            runs[-1] = replace(last, stop=event.stop)
        else:
            runs.append(event)
    return runs
