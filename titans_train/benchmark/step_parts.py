"""Where the time of a training step goes: by phase (forward, backward, optimizer) and by part of the model.

A timeline on the device: every border between parts takes the time (on a GPU an event in the stream, which nothing
waits for), in the forward as functions begin and end, in the backward as the gradients of their outputs and inputs are
there. What lies between two borders belongs to the part that was entered last.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from titans_train.memory.layer import NeuralMemory
from titans_train.memory.peers.layer import PeerMemory
from titans_train.models.blocks import Block
from titans_train.models.layers import FeedForward
from titans_train.models.mac import MACBlock
from titans_train.models.parts import Columns, Rows
from titans_train.parallel import Engine

PHASES = ("forward", "backward", "optimizer", "other")
PARTS = ("memory", "attention", "feed_forward", "projections", "head", "rest")  # head: and loss; rest: norms, sums


class Timeline:
    def __init__(self, device: str) -> None:
        self.device, self.phase = device, "other"
        self.inside: list[str] = []  # parts that were entered; the first counts
        self.marks: list[tuple[Any, str, str]] = []  # a time, and the phase and the part from then on

    def mark(self) -> None:
        now: Any = time.process_time()
        if self.device == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((now, self.phase, self.inside[0] if self.inside else "rest"))

    def enter(self, part: str) -> None:
        self.inside.append(part)
        self.mark()

    def leave(self, part: str) -> None:
        if part in self.inside:
            self.inside.reverse()
            self.inside.remove(part)
            self.inside.reverse()
        self.mark()

    def seconds(self) -> Counter[tuple[str, str]]:
        """By phase and part, from the first mark to the last."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        spent: Counter[tuple[str, str]] = Counter()
        for (begin, phase, part), (end, _, _) in zip(self.marks, self.marks[1:], strict=False):
            took = begin.elapsed_time(end) / 1e3 if self.device == "cuda" else end - begin
            spent[phase, part] += took
        return spent


class _Border(torch.autograd.Function):
    """The same tensors; `passed` is called in the backward, when the gradients of all of them are there."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.passed()
        return (None, *gradients)


def _bordered(values: Any, passed: Callable[[], None]) -> Any:
    """Nested tuples, lists and dicts; of other containers nothing."""
    leaves, how = tree_flatten(values)
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if places:
        for n, t in zip(places, _Border.apply(passed, *(leaves[n] for n in places)), strict=True):
            leaves[n] = t
    return tree_unflatten(leaves, how)


def as_part(function: Callable[..., Any], part: str, timeline: Timeline) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _bordered((args, kwargs), lambda: timeline.leave(part))
        timeline.enter(part)
        out = function(*args, **kwargs)
        timeline.leave(part)
        return _bordered(out, lambda: timeline.enter(part))

    return timed


def _as_phase(function: Callable[..., Any], phase: str, timeline: Timeline, first: str | None) -> Callable[..., Any]:
    """first: the part that the phase begins in."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        before, timeline.phase = timeline.phase, phase
        timeline.inside = [] if first is None else [first]
        timeline.mark()
        out = function(*args, **kwargs)
        timeline.phase, timeline.inside = before, []
        timeline.mark()
        return out

    return timed


def watch(engine: Engine, device: str) -> Timeline:
    """Puts borders into an engine and its model, for good."""
    timeline, model = Timeline(device), engine.model
    for m in model.modules():
        part = _part_of(m)
        if part is not None:
            m.forward = as_part(m.forward, part, timeline)
        if isinstance(m, NeuralMemory):
            m.read = as_part(m.read, "memory", timeline)  # type: ignore[method-assign]
        if isinstance(m, MACBlock):
            m._attend = as_part(m._attend, "attention", timeline)  # type: ignore[method-assign]
        elif isinstance(m, Block) and (attention := getattr(m, "attention", None)) is not None:
            m.attention = as_part(attention, "attention", timeline)  # type: ignore[assignment]
    norm: Any = model.norm
    norm.forward = _then_head(norm.forward, timeline)
    model.forward = _as_phase(model.forward, "forward", timeline, None)  # type: ignore[method-assign]
    engine.backward = _as_phase(engine.backward, "backward", timeline, "head")  # type: ignore[method-assign]
    engine.step = _as_phase(engine.step, "optimizer", timeline, None)  # type: ignore[method-assign]
    return timeline


def _part_of(module: torch.nn.Module) -> str | None:
    kinds: dict[str, tuple[type, ...]] = {
        "memory": (NeuralMemory, PeerMemory), "feed_forward": (FeedForward,), "projections": (Columns, Rows),
    }  # fmt: skip
    return next((part for part, types in kinds.items() if isinstance(module, types)), None)


def _then_head(function: Callable[..., Any], timeline: Timeline) -> Callable[..., Any]:
    """Of the last norm: head and loss come after it in the forward, and before it in the backward."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        out = _bordered(function(*args, **kwargs), lambda: timeline.leave("head"))
        timeline.enter("head")
        return out

    return timed
