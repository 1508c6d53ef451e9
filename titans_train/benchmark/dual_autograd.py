"""The dual form left to autograd: a peer that `benchmark memory` measures the own backward against.

Same function as `memory_scan` for a sequence of whole chunks from a chunk border, momentum and forgetting on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.memory.recurrence import NORM_EPS
from titans_train.memory.state import MemoryState


def _decay(gate: Tensor) -> Tensor:
    """[..., b] -> [..., b, b] with the product of gate over j+1..t at [t, j], zero above the diagonal."""
    b = gate.shape[-1]
    below = torch.ones(b, b, dtype=torch.bool, device=gate.device).tril(-1)
    steps = torch.where(below, gate[..., :, None], 1.0)
    return steps.cumprod(-2).tril()


def dual_autograd(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, state: MemoryState, *,
    chunk_size: int, gain: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Shapes as in `memory_scan`; depth 2 with SiLU. Returns y."""
    (w1, w2), (s1, s2) = state.weights, state.momentum
    outputs = []
    for t in range(0, q.shape[2], chunk_size):
        span = slice(t, t + chunk_size)
        qc, kc, vc = q[:, :, span], k[:, :, span], v[:, :, span]
        keep, et, th = 1 - alpha[:, :, span], eta[:, :, span], theta[:, :, span]
        d_alpha, d_eta = _decay(keep), _decay(et)
        e, a = et.cumprod(-1), keep.cumprod(-1)
        c, b = (d_alpha @ d_eta) * th[..., None, :], (d_alpha @ e[..., None])
        z = kc @ w1
        x = F.silu(z)
        out = x @ w2
        if gain is not None and bias is not None:
            mean = out.mean(-1, keepdim=True)
            rstd = (out.var(-1, keepdim=True, unbiased=False) + NORM_EPS).rsqrt()
            n = (out - mean) * rstd
            u = gain[:, None] * (kc + n * gain[:, None] + bias[:, None] - vc)
            delta = rstd * (u - u.mean(-1, keepdim=True) - n * (u * n).mean(-1, keepdim=True))
        else:
            delta = out - vc
        sig = z.sigmoid()
        delta1 = (delta @ w2.mT) * (sig * (1 + z * (1 - sig)))
        y = (a[..., None] * qc) @ w1 + (b * qc) @ s1 - ((qc @ kc.mT) * c) @ delta1
        h = F.silu(y)
        y = a[..., None] * (h @ w2) + b * (h @ s2) - ((h @ x.mT) * c) @ delta
        if gain is not None and bias is not None:
            y = qc + F.layer_norm(y, y.shape[-1:], eps=NORM_EPS) * gain[:, None] + bias[:, None]
        outputs.append(y)
        end, last = c[..., -1, :, None], (d_eta[..., -1, :] * th)[..., None]
        ab, bb, eb = a[..., -1, None, None], b[..., -1, :, None], e[..., -1, None, None]
        w1, s1 = ab * w1 + bb * s1 - (end * kc).mT @ delta1, eb * s1 - (last * kc).mT @ delta1
        w2, s2 = ab * w2 + bb * s2 - x.mT @ (end * delta), eb * s2 - x.mT @ (last * delta)
    return torch.cat(outputs, 2)
