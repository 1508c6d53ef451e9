"""models/neighbours.py for sequence shards: a layer's messages to the left and right, as nodes of autograd's graph.

Autograd runs nodes in the reverse order of their forward, so that gradients leave in the reverse order of the
messages, on every rank alike. Every rank must reach every node: what is sent is tied to a value that leads to the
loss, and what is received depends on a leaf that wants a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.scan import Spec, memory_scan
from titans_train.memory.state import MemoryState
from titans_train.parallel.affine_scan import affine_scan
from titans_train.parallel.links import Label, Links
from titans_train.parallel.wavefront import wave_scan
from titans_train.plan_messages import part_sizes, reach


@dataclass(frozen=True)
class ShardSettings:
    length: int  # tokens of a shard (the last may have fewer)
    pieces: int = 1  # of a scan: groups of rows (batch and heads; in MAC batch alone) sent one by one
    strategy: str = "wavefront"  # or "affine"
    carries: bool = False  # the first shard goes on where the last one of the batch before has ended


class Tape:
    """What a forward has received, for its repetition under activation checkpointing."""

    def __init__(self) -> None:
        self.received: list[list[Tensor]] = []
        self.next: int | None = None  # None: recording


class Shards:
    """Of one layer."""

    def __init__(self, links: Links, layer: int, settings: ShardSettings) -> None:
        self.links, self.layer = links, layer
        self.set(settings)
        self.anchor = torch.zeros((), requires_grad=True)
        self.tape: Tape | None = None

    def set(self, settings: ShardSettings) -> None:
        self.settings, self.position = settings, self.links.shard * settings.length

    # ---- messages

    def label(self, name: str, piece: int, gradient: bool = False) -> Label:
        return Label(self.layer, name, piece, gradient)

    def outgoing(self, name: str, tensors: Sequence[Tensor], piece: int = 0) -> None:
        """To the right; nothing in the last shard, and in a repetition."""
        if self.links.has("right") and not self.repeats:
            self.links.send("right", self.label(name, piece), tensors)

    def incoming(self, name: str, start: Sequence[Tensor], piece: int = 0) -> Sequence[Tensor]:
        """From the left; `start` in the first shard."""
        if not self.links.has("left"):
            return start
        return self.once(lambda: self.links.receive("left", self.label(name, piece), start))

    def once(self, exchange: Any) -> list[Tensor]:
        """The tensors that an exchange gives; in a repetition those of the first time."""
        tape = self.tape
        if tape is not None and tape.next is not None:
            tape.next += 1
            return tape.received[tape.next - 1]
        tensors: list[Tensor] = exchange()
        if tape is not None:
            tape.received.append(tensors)
        return tensors

    def ahead(self, name: str, like: Sequence[Tensor], piece: int) -> None:
        """Posts the receive of a message that is wanted next but one."""
        if self.links.has("left") and not self.repeats:
            self.links.expect("left", self.label(name, piece), like)

    @property
    def repeats(self) -> bool:
        return self.tape is not None and self.tape.next is not None

    # ---- models/neighbours.py

    def send(self, name: str, through: Tensor, tensors: Sequence[Tensor], piece: int = 0) -> Tensor:
        if not self.links.has("right") or not any(t.numel() for t in tensors):
            return through
        out: Tensor = _Send.apply(self, name, piece, through, *tensors)
        return out

    def receive(self, name: str, start: Sequence[Tensor], piece: int = 0) -> Sequence[Tensor]:
        if not self.links.has("left") or not any(t.numel() for t in start):
            return start
        return _Receive.apply(self, name, piece, self.anchor, *start)  # type: ignore[no-any-return]

    def scan(self, *call: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        return memory_scan(*call, **options, run=self._run)

    def _run(self, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """memory.scan's `run`."""
        if spec.entered or (spec.ends_inside and self.links.has("right")):
            raise ValueError("a shard of a sequence begins and ends at a chunk border; only the last may end inside")
        run = affine_scan if self.settings.strategy == "affine" else wave_scan
        return run(self, spec, *tensors)

    def reach(self, window: int | None) -> int:
        return reach(window, self.position, self.settings.carries)

    def pieces(self, rows: int) -> list[slice]:
        ends = [0, *accumulate(part_sizes(rows, self.settings.pieces))]
        return [slice(a, b) for a, b in pairwise(ends)]

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        tape = Tape()
        return self._with(tape, repeat=False), self._with(tape, repeat=True)

    @contextmanager
    def _with(self, tape: Tape, repeat: bool) -> Iterator[None]:
        before, self.tape, tape.next = self.tape, tape, 0 if repeat else None
        try:
            yield
        finally:
            self.tape = before


class _Send(torch.autograd.Function):
    """through, *tensors -> through. Backward: waits for the gradients of the tensors from the right."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, name: str, piece: int, through: Tensor, *tensors: Tensor) -> Tensor:
        shards.outgoing(name, tensors, piece)
        ctx.shards, ctx.name, ctx.piece = shards, name, piece
        ctx.ghosts = [_Ghost(t) if t.is_floating_point() else None for t in tensors]
        return through.view_as(through)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_through: Tensor) -> tuple[Tensor | None, ...]:
        shards: Shards = ctx.shards
        like = [ghost.like() for ghost in ctx.ghosts if ghost is not None]
        received = iter(shards.links.gradient(shards.label(ctx.name, ctx.piece, gradient=True), like))
        gradients = [None if ghost is None else next(received) for ghost in ctx.ghosts]
        return (None, None, None, d_through, *gradients)


class _Receive(torch.autograd.Function):
    """anchor, *start -> what the left has sent. Backward: sends the gradients to the left; the start gets zeros."""

    @staticmethod
    def forward(ctx: Any, shards: Shards, name: str, piece: int, anchor: Tensor, *start: Tensor) -> tuple[Tensor, ...]:
        received = shards.incoming(name, start, piece)
        ctx.shards, ctx.name, ctx.piece = shards, name, piece
        ctx.mark_non_differentiable(*(t for t in received if not t.is_floating_point()))
        ctx.start = [_Ghost(t) if t.is_floating_point() else None for t in start]
        return tuple(received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shards: Shards = ctx.shards
        wanted = [g for g, ghost in zip(gradients, ctx.start, strict=True) if ghost is not None]
        shards.links.answer(shards.label(ctx.name, ctx.piece, gradient=True), wanted)
        needs = ctx.needs_input_grad[4:]
        zeros = [ghost.zeros() if need else None for ghost, need in zip(ctx.start, needs, strict=True)]
        return (None, None, None, None, *zeros)


class _Ghost:
    """A tensor's shape, dtype and device, without its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device

    def like(self) -> Tensor:
        """A tensor of this shape that takes no memory."""
        return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
