"""What a layer exchanges with the shards of its sequence to the left and right, and the form for an uncut sequence.

A sequence may be cut into shards of neighbouring tokens, each on a device of its own. What a layer carries from one
token to the next then goes from a shard to the one on its right: the memory's state, the last inputs of convolutions,
the keys of a window. Gradients come back the same way. `parallel/` brings the form for many shards; `Uncut` is its
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from titans_train.memory.scan import memory_scan
from titans_train.memory.state import MemoryState


class Neighbours(Protocol):
    """Of one layer. `name`: what is sent ("window", "tails", "chain"), the same on both sides and in the same order."""

    position: int  # tokens of the sequence to the left of this shard

    def send(self, name: str, through: Tensor, tensors: Sequence[Tensor], piece: int = 0) -> Tensor:
        """Hands `tensors` on to the right. Returns `through`, which must lead to the loss: so do the tensors then."""

    def receive(self, name: str, start: Sequence[Tensor], piece: int = 0) -> Sequence[Tensor]:
        """What the left has sent; in the first shard `start`, which elsewhere only gives the shapes."""

    def scan(self, *call: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        """memory_scan over the whole sequence: its state is the start of the first shard, and this shard's end."""

    def reach(self, window: int | None) -> int:
        """Keys to the left of this shard that its first token sees: `window - 1` at most (None: all)."""

    def pieces(self, rows: int) -> list[slice]:
        """Groups of rows whose states are handed on one after the other (MAC)."""

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For activation checkpointing: around a forward, and around its repetition, which sends nothing again."""


class Uncut:
    """The whole sequence is here."""

    position: int = 0

    def send(self, name: str, through: Tensor, tensors: Sequence[Tensor], piece: int = 0) -> Tensor:
        return through

    def receive(self, name: str, start: Sequence[Tensor], piece: int = 0) -> Sequence[Tensor]:
        return start

    def scan(self, *call: Any, **options: Any) -> tuple[Tensor, MemoryState]:
        return memory_scan(*call, **options)

    def reach(self, window: int | None) -> int:
        return 0

    def pieces(self, rows: int) -> list[slice]:
        return [slice(0, rows)]

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), nullcontext()


UNCUT = Uncut()
