"""Small layers shared by all blocks. Shapes: B batch, L tokens, D width, H heads, d = D / H."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.fusion import fused
from titans_train.models.parts import Parts
from titans_train.shape import ModelShape


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, with an explicit epsilon (a vanishing memory must not decide it)."""

    def __init__(self, width: int, eps: float, parts: Parts) -> None:
        super().__init__()
        self.eps = eps
        self.scale = parts.parameter(torch.ones(width), None)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), self.eps)


class HeadNorm(nn.Module):
    """RMSNorm of each head with its own vector scale: [B, L, H, d] -> the same. Needs no other head."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        super().__init__()
        self.eps, self.fuse = shape.norm_eps, shape.compile
        self.scale = parts.parameter(torch.ones(shape.heads, shape.head_dim), 0)

    def forward(self, x: Tensor, *others: Tensor, function: Callable[..., Tensor] | None = None) -> Tensor:
        """function: of x, scale, eps and `others`, one of those below; None: the norm alone."""
        return fused(function or head_norm, self.fuse)(x, self.scale, self.eps, *others)


def head_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, eps) * scale.to(x.dtype)


def normed_times_silu(x: Tensor, scale: Tensor, eps: float, gate: Tensor) -> Tensor:
    """x [B, L, H, d], gate [B, L, H d] -> the same"""
    return head_norm(x, scale, eps).flatten(2) * F.silu(gate)


def silu_normed(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.silu(head_norm(x, scale, eps))


def silu_normed_times(x: Tensor, scale: Tensor, eps: float, y: Tensor) -> Tensor:
    """x, y [B, L, H, d] -> [B, L, H d]"""
    return (y * silu_normed(x, scale, eps)).flatten(2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), on the residual stream [N, D]."""

    def __init__(self, shape: ModelShape, out_std: float, parts: Parts) -> None:
        super().__init__()
        self.fuse, width, hidden = shape.compile, shape.width, shape.feed_forward
        self.project = parts.columns(width, {"gate": hidden, "up": hidden}, shape.initializer_std)
        self.down = parts.rows(hidden, width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(x)
        return self.down(fused(swiglu, self.fuse)(h["gate"], h["up"]))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rotate(x: Tensor, first: int, base: float, compiled: bool = False) -> Tensor:
    """Rotary position embedding of x [B, H, L, d] at positions first, first + 1, ... (angles in float64)."""
    return turn(x, torch.arange(first, first + x.shape[-2], device=x.device, dtype=torch.float64), base, compiled)


def turn(x: Tensor, positions: Tensor, base: float, compiled: bool = False) -> Tensor:
    """x [B, H, L, d] moved on by `positions` (float64 [L] or [1])."""
    d = x.shape[-1]
    frequency = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angle = positions[:, None] * frequency
    return fused(turned, compiled)(x, angle.cos().to(x.dtype), angle.sin().to(x.dtype))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (x_i, x_{i + d / 2}) of x [B, H, L, d] turned by angles [L, d / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
