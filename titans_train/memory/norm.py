"""The layer norm inside the memory, M(k) = k + gain * LayerNorm(MLP(k)) + bias, without autograd.

Shapes: z, x, u [n, T, d]; gain, bias [n, 1, d]; rstd [n, T, 1]. n = batch * heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.memory.recurrence import NORM_EPS


def _mean(x: Tensor) -> Tensor:
    return x.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Normalised:
    """LayerNorm(z) without gain, and what its derivatives need."""

    value: Tensor
    rstd: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Normalised:
        value, _, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, NORM_EPS)
        return cls(value, rstd)

    def pull(self, u: Tensor) -> Tensor:
        """The adjoint (and, being symmetric, also the derivative) applied to u: rstd (u - mean u - x mean(u x))."""
        return self.rstd * (u - _mean(u)).sub_(self.value * _mean(u * self.value))

    def pull_backward(self, u: Tensor, pulled: Tensor, d_pulled: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of (u, z) where pulled = pull(u) and d_pulled is its gradient."""
        x, r = self.value, self.rstd
        d_u = self.pull(d_pulled)
        d_x = -r * (d_pulled * _mean(u * x) + u * _mean(d_pulled * x))
        # through rstd: d rstd / d z = -rstd^2 x / d
        through_rstd = (d_pulled * pulled).sum(dim=-1, keepdim=True) / r * (-r.square() / x.shape[-1])
        return d_u, self.pull(d_x).addcmul_(through_rstd, x)
