"""Activations of the memory MLP with the two derivatives that the scan's backward needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(Protocol):
    def value(self, z: Tensor) -> Tensor: ...

    def times_slope(self, gradient: Tensor, z: Tensor) -> Tensor:
        """gradient * f'(z), in one fused operation."""
        ...

    def curvature(self, z: Tensor) -> Tensor:
        """f''(z)"""
        ...


@dataclass(frozen=True)
class Silu:
    def value(self, z: Tensor) -> Tensor:
        return F.silu(z)

    def times_slope(self, gradient: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(gradient, z)

    def curvature(self, z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        slope = torch.addcmul(s, s, s, value=-1)  # s (1 - s)
        return slope.mul_(torch.addcmul(z + 2, z, s, value=-2))


@dataclass(frozen=True)
class Gelu:
    def value(self, z: Tensor) -> Tensor:
        return F.gelu(z)

    def times_slope(self, gradient: Tensor, z: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward(gradient, z)

    def curvature(self, z: Tensor) -> Tensor:
        square = z * z
        return (2 - square) * torch.exp(-0.5 * square) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Activation] = {"silu": Silu(), "gelu": Gelu()}
