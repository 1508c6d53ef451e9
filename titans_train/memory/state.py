"""What the memory carries from one token to the next."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Weights = tuple[Tensor, ...]  # one [batch, heads, d_in, d_out] per layer of the memory MLP


@dataclass(frozen=True)
class MemoryState:
    """Weights W and momentum S of the memory after some token (paper, eq. 9-14).

    weights, momentum: tuples of [batch, heads, d_in, d_out], one per layer. `momentum` may be empty where
    momentum is switched off. `anchor` and `offset` describe a position inside a chunk: the weights at which
    that chunk's gradients are taken, and how many of its tokens are already written; at a chunk border
    they are None and 0.
    """

    weights: Weights
    momentum: Weights
    anchor: Weights | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if (self.anchor is None) != (self.offset == 0):
            raise ValueError(f"a state inside a chunk has both an anchor and an offset; offset is {self.offset}")

    @classmethod
    def start(cls, weights: Weights, momentum: bool = True) -> MemoryState:
        """The state before the first token: learned initial weights, momentum zero."""
        return cls(weights, tuple(torch.zeros_like(w) for w in weights) if momentum else ())

    def map(self, function: object) -> MemoryState:
        """A state with `function` (Tensor -> Tensor) applied to every tensor."""
        assert callable(function)
        anchor = None if self.anchor is None else tuple(function(w) for w in self.anchor)
        return MemoryState(
            tuple(function(w) for w in self.weights), tuple(function(s) for s in self.momentum), anchor, self.offset
        )

    def detach(self) -> MemoryState:
        return self.map(torch.Tensor.detach)

    def at_border(self) -> MemoryState:
        """The same weights and momentum, with a new chunk (a new anchor) starting at the next token."""
        return MemoryState(self.weights, self.momentum)

    def expand(self, batch: int) -> MemoryState:
        """A state of batch 1 repeated for `batch` rows, without copying."""
        return self.map(lambda w: w.expand(batch, *w.shape[1:]))

    def replace_rows(self, rows: Tensor, other: MemoryState) -> MemoryState:
        """The rows where `rows` ([batch] bool) is true come from `other` (batch 1 or the same batch)."""
        if self.offset or other.offset:
            raise ValueError(f"rows can be replaced at a chunk border only; offsets {self.offset}, {other.offset}")
        pick = rows[:, None, None, None]
        return MemoryState(
            tuple(torch.where(pick, b, a) for a, b in zip(self.weights, other.weights, strict=True)),
            tuple(torch.where(pick, b, a) for a, b in zip(self.momentum, other.momentum, strict=True)),
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file: weights.N, momentum.N, anchor.N, and the offset as metadata."""
        tensors = {f"weights.{n}": w for n, w in enumerate(self.weights)}
        tensors |= {f"momentum.{n}": s for n, s in enumerate(self.momentum)}
        tensors |= {f"anchor.{n}": w for n, w in enumerate(self.anchor or ())}
        contiguous = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(contiguous, str(path), metadata={"offset": str(self.offset)})

    @classmethod
    def load(cls, path: str | Path) -> MemoryState:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            offset = int(file.metadata()["offset"])

        def layers(part: str) -> Weights:
            count = sum(name.startswith(f"{part}.") for name in tensors)
            return tuple(tensors[f"{part}.{n}"] for n in range(count))

        return cls(layers("weights"), layers("momentum"), layers("anchor") or None, offset)
