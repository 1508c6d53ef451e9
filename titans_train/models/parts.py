"""The pieces that differ between one process and many, and their single-process form.

A block asks for a column linear (output split over devices), a row linear (input split, output summed), gates
(split by head), an embedding and a cross-entropy. `parallel/` may bring other forms; these are the reference.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Parts(Protocol):
    def column_linear(self, inputs: int, outputs: int, std: float) -> nn.Module: ...

    def row_linear(self, inputs: int, outputs: int, std: float) -> nn.Module: ...

    def gates(self, width: int, heads: int, biases: list[float], std: float) -> nn.Module: ...

    def embedding(self, vocabulary: int, width: int, std: float) -> nn.Module: ...

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor: ...


def linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Gates(nn.Module):
    """x [B, L, D] -> pre-activations [B, gates, L, H], one linear map for all of them."""

    def __init__(self, width: int, heads: int, biases: list[float], std: float) -> None:
        super().__init__()
        self.count, self.heads = len(biases), heads
        self.weight = nn.Parameter(torch.randn(len(biases) * heads, width) * std)
        self.bias = nn.Parameter(torch.tensor(biases).repeat_interleave(heads))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).unflatten(-1, (self.count, self.heads)).movedim(2, 1)


class TokenEmbedding(nn.Module):
    """Tokens [B, L] -> vectors [B, L, D]; with `as_head`, vectors -> logits [B, L, V] by the same table (tied head).

    Both ways go through this forward, so that the module that owns the table is the one that uses it (ZeRO-3).
    """

    def __init__(self, vocabulary: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, width) * std)

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        return F.linear(x, self.weight) if as_head else F.embedding(x, self.weight)


class SingleProcess:
    """Everything on one device."""

    def column_linear(self, inputs: int, outputs: int, std: float) -> nn.Module:
        return linear(inputs, outputs, std)

    def row_linear(self, inputs: int, outputs: int, std: float) -> nn.Module:
        return linear(inputs, outputs, std)

    def gates(self, width: int, heads: int, biases: list[float], std: float) -> nn.Module:
        return Gates(width, heads, biases, std)

    def embedding(self, vocabulary: int, width: int, std: float) -> nn.Module:
        return TokenEmbedding(vocabulary, width, std)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [B, L, V], labels [B, L] with -100 ignored -> the sum over tokens, in float32 or better."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)
