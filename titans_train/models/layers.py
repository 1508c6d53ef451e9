"""Small layers shared by all blocks. Shapes: B batch, L tokens, D width, H heads, d = D / H."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.models.parts import Parts


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

    def __init__(self, heads: int, head_dim: int, eps: float, parts: Parts) -> None:
        super().__init__()
        self.eps = eps
        self.scale = parts.parameter(torch.ones(heads, head_dim), 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.scale.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), on the residual stream [N, D]."""

    def __init__(self, width: int, hidden: int, std: float, out_std: float, parts: Parts) -> None:
        super().__init__()
        self.project = parts.columns(width, {"gate": hidden, "up": hidden}, std)
        self.down = parts.rows(hidden, width, out_std)

    def forward(self, x: Tensor) -> Tensor:
        h = self.project(x)
        return self.down(F.silu(h["gate"]) * h["up"])


def rotate(x: Tensor, first: int, base: float) -> Tensor:
    """Rotary position embedding of x [B, H, L, d] at positions first, first + 1, ... (angles in float64)."""
    return turn(x, torch.arange(first, first + x.shape[-2], device=x.device, dtype=torch.float64), base)


def turn(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """x [B, H, L, d] moved on by `positions` (float64 [L] or [1])."""
    d = x.shape[-1]
    frequency = base ** (-torch.arange(0, d, 2, device=x.device, dtype=torch.float64) / d)
    angle = positions[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
