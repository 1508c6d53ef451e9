"""Messages between a rank and those with the shards to its left and right.

A message is one buffer of bytes: a header, then the tensors in their own dtype. The header says which message it is;
both sides run the same program, so the next message of an edge is the one that is expected, and anything else is an
error, never a wrong number. Sends do not block: their buffers are kept until the message has gone. Each direction of
an edge has a process group of its own.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from titans_train.parallel.groups import edge_group
from titans_train.parallel.mesh import Mesh
from titans_train.plan_messages import HEADER, OUTSTANDING, padded

Side = Literal["left", "right"]
NAMES = ("state", "window", "tails", "chain", "map", "adjoint")
# A header (plan_messages.HEADER bytes): number of the message on its edge, layer, name, piece, bytes that follow.


class NeighbourError(RuntimeError):
    """A neighbouring shard did not answer, or sent something else than expected."""


@dataclass(frozen=True)
class Label:
    """Which message: of which layer, what, which piece of it; `gradient`: on its way back."""

    layer: int
    name: str
    piece: int = 0
    gradient: bool = False

    def __str__(self) -> str:
        what = f"the gradient of {self.name!r}" if self.gradient else repr(self.name)
        return f"{what}, layer {self.layer}, piece {self.piece}"

    def header(self, number: int, size: int) -> Tensor:
        name = NAMES.index(self.name) + len(NAMES) * self.gradient
        return torch.tensor([number, self.layer, name, self.piece, size])


def describe(header: Tensor) -> str:
    number, layer, name, piece, size = header.tolist()
    if not 0 <= name < 2 * len(NAMES):
        return "no message of ours"
    label = Label(layer, NAMES[name % len(NAMES)], piece, name >= len(NAMES))
    return f"message {number} ({label}) of {size} bytes"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _buffer(like: Sequence[Tensor], before: int = 0) -> Tensor:
    """Room for such tensors, behind so many bytes."""
    total = before + sum(padded(_size(tensor)) for tensor in like)
    return torch.empty(total, dtype=torch.uint8, device=like[0].device)


def _places(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in a buffer, as views."""
    parts = buffer.split([padded(_size(tensor)) for tensor in like])
    return [p[: _size(t)].view(t.dtype).view(t.shape) for p, t in zip(parts, like, strict=True)]


@dataclass
class _Expected:
    label: Label
    header: Tensor
    buffer: Tensor
    work: Any
    like: Sequence[Tensor]


class Links:
    """This rank's edges. count, bytes: of the messages that it has sent, by (side, name)."""

    def __init__(self, mesh: Mesh) -> None:
        self.shard, self.shards, self.rank = mesh.sequence_rank, mesh.sequence, mesh.rank
        self._who = _who(mesh)
        self.peer = {side: mesh.neighbour(side) for side in ("left", "right")}
        self.count: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self._sent: dict[str, deque[tuple[Label, Any, Tensor]]] = {"left": deque(), "right": deque()}
        self._posted: dict[str, deque[_Expected]] = {"left": deque(), "right": deque()}
        self._out: Counter[str] = Counter()
        self._in: Counter[str] = Counter()
        self._settles = False  # at the end of the running backward
        self._unchecked: list[tuple[Tensor, Tensor, str]] = []

    def has(self, side: Side) -> bool:
        return self.peer[side] is not None

    def send(self, to: Side, label: Label, tensors: Sequence[Tensor]) -> None:
        """Starts a message; the tensors may change afterwards."""
        buffer = self._pack(to, label, tensors)
        sent = self._sent[to]
        if len(sent) >= OUTSTANDING:
            self._take(to)
        group = edge_group("rightward" if to == "right" else "leftward")
        sent.append((label, dist.isend(buffer, self.peer[to], group=group), buffer))
        self.count[to, label.name] += 1
        self.bytes[to, label.name] += buffer.numel()

    def answer(self, label: Label, gradients: Sequence[Tensor]) -> None:
        """To the left, within a backward: at its end these will have been taken."""
        self.send("left", label, gradients)
        if not self._settles:
            self._settles = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)  # type: ignore[attr-defined]

    def _pack(self, to: Side, label: Label, tensors: Sequence[Tensor]) -> Tensor:
        buffer = _buffer(tensors, HEADER)
        buffer[:HEADER].view(torch.int64).copy_(label.header(self._out[to], buffer.numel() - HEADER))
        self._out[to] += 1
        for place, tensor in zip(_places(buffer[HEADER:], tensors), tensors, strict=True):
            place.copy_(tensor.detach())
        return buffer

    def expect(self, source: Side, label: Label, like: Sequence[Tensor]) -> None:
        """Posts the receive of a message with tensors of these shapes and dtypes. It may be waited for later."""
        buffer = _buffer(like, HEADER)
        group = edge_group("rightward" if source == "left" else "leftward")
        header = label.header(self._in[source], buffer.numel() - HEADER)
        self._in[source] += 1
        work = dist.irecv(buffer, self.peer[source], group=group)
        self._posted[source].append(_Expected(label, header, buffer, work, like))

    def gradient(self, label: Label, like: Sequence[Tensor]) -> list[Tensor]:
        """From the right: the answer to a message. All that was sent there has arrived, for it was sent before."""
        received = self.receive("right", label, like)
        self.settle("right")
        return received

    def receive(self, source: Side, label: Label, like: Sequence[Tensor]) -> list[Tensor]:
        """Waits for the message. NeighbourError if it does not come, or is another."""
        if not self._posted[source]:
            self.expect(source, label, like)
        expected = self._posted[source].popleft()
        assert expected.label == label, f"{label} is asked for, but {expected.label} was posted"
        self._wait(expected.work, f"{label} from its {source} neighbour, rank {self.peer[source]}")
        if expected.buffer.device.type == "cpu":
            self._check(expected.header, expected.buffer[:HEADER], source)
        else:  # looking at it would make the host wait for the device
            self._unchecked.append((expected.header, expected.buffer[:HEADER].clone(), source))
        return self._unpack(expected)

    def _unpack(self, expected: _Expected) -> list[Tensor]:
        return _places(expected.buffer[HEADER:], expected.like)

    def _check(self, expected: Tensor, got: Tensor, source: str) -> None:
        got = got.view(torch.int64).cpu()
        if not torch.equal(got, expected):
            raise NeighbourError(
                f"rank {self.rank} expected {describe(expected)} from its {source} neighbour, rank "
                f"{self.peer[source]}, and got {describe(got)}: the ranks do not run the same program and config"
            )

    def gather(self, label: Label, own: Tensor) -> list[Tensor]:
        """Every shard's tensor, in order (the affine scan's exchange). Collective over the shards."""
        out = own.new_empty(self.shards * own.shape[0], *own.shape[1:])
        with _waiting(self._who, f"every shard's {label}"):
            dist.all_gather_into_tensor(out, own.contiguous(), group=edge_group("rightward"))
        self.count["all", label.name] += 1
        self.bytes["all", label.name] += _size(own)
        return list(out.unflatten(0, (self.shards, -1)))

    def _end_of_backward(self) -> None:
        """Before anything is reduced over the shards: a neighbour that hangs is named here, and not nowhere there."""
        self._settles = False
        self.settle("left")

    def _wait(self, work: Any, what: str) -> None:
        with _waiting(self._who, what):
            work.wait()

    def _take(self, to: str) -> None:
        label, work, _ = self._sent[to].popleft()
        self._wait(work, f"{label} to be taken by its {to} neighbour, rank {self.peer[to]}")

    def settle(self, to: Side) -> None:
        """Waits until all messages to a side have been taken, and frees their buffers."""
        while self._sent[to]:
            self._take(to)

    def finish(self) -> None:
        """At the end of a wave: everything that was sent has arrived."""
        sides: tuple[Side, Side] = ("left", "right")
        for side in sides:
            assert not self._posted[side], f"{self._posted[side][0].label} was expected and never asked for"
            self.settle(side)
        for expected, got, source in self._unchecked:
            self._check(expected, got, source)
        self._unchecked.clear()


def _who(mesh: Mesh) -> str:
    return f"rank {mesh.rank} (shard {mesh.sequence_rank} of {mesh.sequence})"


@contextmanager
def _waiting(who: str, what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise NeighbourError(
            f"{who} waited for {what}, in vain: a rank has died, or hangs for longer than parallel.timeout_seconds "
            f"({str(error).splitlines()[0]})"
        ) from error


def hand_over(tensors: list[Tensor], mesh: Mesh) -> list[Tensor] | None:
    """The last shard's tensors, on the first shard; None on the others. Collective over the shards of a sequence."""
    shard, last = mesh.sequence_rank, mesh.sequence - 1
    if last == 0:
        return tensors
    group, who = edge_group("leftward"), _who(mesh)
    if shard not in (0, last):
        return None
    buffer = _buffer(tensors)
    places = _places(buffer, tensors)
    if shard == last:
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor)
        with _waiting(who, f"its carried state to be taken by the first shard, rank {mesh.shard_rank(0)}"):
            dist.send(buffer, mesh.shard_rank(0), group=group)
        return None
    with _waiting(who, f"the carried state of the last shard, rank {mesh.shard_rank(last)}"):
        dist.recv(buffer, mesh.shard_rank(last), group=group)
    return places
