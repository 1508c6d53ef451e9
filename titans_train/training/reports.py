"""What a run says about itself at its logged steps: metrics.jsonl, TensorBoard, the console."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, stack

from titans_train.monitoring.console import Console
from titans_train.monitoring.metrics import Metrics
from titans_train.monitoring.throughput import measured_peak_flops, peak_memory_bytes
from titans_train.parallel import Mesh, gather, mean_over_ranks
from titans_train.plan import Plan

LATE = 0.05  # seconds per step that a rank must be behind the others to be named: of short steps, all is noise


@dataclass
class Window:
    """Of training since the last logged step, in seconds."""

    started: float
    tokens: int = 0
    steps: int = 0
    waited: float = 0.0  # for data
    own: float = 0.0  # not blocked by other ranks; with the wait for data


class Reports:
    """Written and said by the first rank; what ranks have to be asked for is collective."""

    def __init__(self, plan: Plan, mesh: Mesh, first_step: int) -> None:
        watch = plan.config.monitoring
        self.plan, self.mesh, self.first_step = plan, mesh, first_step
        self.console = Console(mesh.is_first, first_step, plan.config.training.steps)
        self.metrics: Metrics | None = None
        if mesh.is_first:
            self.metrics = Metrics(plan.run_directory, first_step, watch.tensorboard, self.say)
        self.peak_flops = watch.peak_flops or measured_peak_flops()
        self.hosts = gather(socket.gethostname())
        self.trained_seconds, self.trained_tokens = 0.0, 0
        self.window = Window(time.perf_counter())
        self.late_rank: int | None = None  # in the last logged window

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()

    def new_window(self) -> None:
        """What happened since the last logged step does not count: something else than training was done."""
        self.window = Window(time.perf_counter())

    def say(self, text: str) -> None:
        self.console.say(text)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(step, figures)

    def sample(self, step: int, text: str) -> None:
        self.say(f"step {step}, sample:\n{text}")
        if self.metrics is not None:
            self.metrics.text(step, "sample", text)

    def log(
        self,
        step: int,
        loss: float,
        norm: float,
        rate: float,
        beside: dict[str, Any],
        records: dict[int, dict[str, Tensor]],
    ) -> None:
        """A logged step; `beside`: more figures. Collective. It waits for the device."""
        window = self.window
        seconds = time.perf_counter() - window.started
        speed = window.tokens / seconds
        self.trained_seconds += seconds
        self.trained_tokens += window.tokens
        figures: dict[str, Any] = {
            "loss": loss, "grad_norm": norm, "learning_rate": rate, "tokens_per_second": speed,
            "mfu": speed * self.plan.flops_per_token / (self.peak_flops * self.plan.world_size),
            "peak_memory_bytes": peak_memory_bytes(),
        }  # fmt: skip
        times = gather((window.own, window.waited))
        figures["data_wait"] = max(waited for _, waited in times) / seconds
        slow = slowest(times)
        figures |= slow
        figures |= beside
        figures |= layer_figures(records, self.mesh)
        self.write(step, figures)
        self.console.progress(step, loss, norm, rate, speed)
        if step > self.first_step + 1:  # which warms up
            late = late_rank(times, window.steps, self.plan.config.monitoring.straggler_ratio)
            if late is not None and late == self.late_rank:
                self._name(step, slow, times)
            self.late_rank = late
        self.new_window()

    def _name(self, step: int, slow: dict[str, float], times: list[tuple[float, float]]) -> None:
        rank, steps = int(slow["slowest_rank"]), self.window.steps
        own, waited = (value / steps for value in times[rank])
        self.say(
            f"step {step}: rank {rank} ({self.hosts[rank]}) is slow: {own:.3f} s per step of its own, "
            f"{slow['slowest_rank_ratio']:.2f} times the median, of it {waited:.3f} s waiting for data"
        )


def late_rank(times: list[tuple[float, float]], steps: int, ratio: float) -> int | None:
    """The slowest rank, if its own time is more than `ratio` medians and LATE seconds per step behind the median."""
    slow = slowest(times)
    if not slow or slow["slowest_rank_ratio"] <= ratio:
        return None
    rank = int(slow["slowest_rank"])
    own = times[rank][0]
    behind = own - own / slow["slowest_rank_ratio"]
    return rank if behind > LATE * steps else None


def slowest(times: list[tuple[float, float]]) -> dict[str, float]:
    """Figures of the rank with the most time of its own, from every rank's (own time, wait for data); {} of one rank.

    The median is that of the other ranks: of few, the slow one would be half of it.
    """
    if len(times) == 1:
        return {}
    own = [own for own, _ in times]
    rank = own.index(max(own))
    usual = statistics.median(own[:rank] + own[rank + 1 :])
    return {"slowest_rank": rank, "slowest_rank_ratio": own[rank] / max(usual, 1e-9)}


def layer_figures(records: dict[int, dict[str, Tensor]], mesh: Mesh) -> dict[str, dict[str, float]]:
    """Means over all ranks (their heads and tokens; each has as many) of what the memory layers recorded.

    Norms are of the states that sequences end with, which are the last shards'. Collective.
    """
    names = [(n, key) for n, values in records.items() for key in values]
    if not names:
        return {}
    ends = mesh.sequence if mesh.sequence_rank == mesh.sequence - 1 else 0
    mine = stack([records[n][key].double() * (ends if "norm" in key else 1) for n, key in names])
    means = mean_over_ranks(mine).tolist()
    figures: dict[str, dict[str, float]] = {}
    for (n, key), mean in zip(names, means, strict=True):
        figures.setdefault(f"layer_{n}", {})[key] = mean
    return figures
