"""The linear recurrence of a matrix, token by token: the definition that scan.py is checked against.

S is a matrix per head that maps keys to values, [d_k, d_v]:

    S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T           y_t = S_t^T q_t

    DeltaNet (arXiv 2406.06484, eq. 3):        w = 1,        a = k,      b = -beta k,           v = beta v
    Gated DeltaNet (arXiv 2412.06464, eq. 10): w = alpha,    a = k,      b = -alpha beta k,     v = beta v
    Mamba2 (arXiv 2405.21060, section 5):      w = exp(A dt), no a and b,                       v = dt x
    RWKV-7 (arXiv 2503.14456, eq. 16, 18):     w per channel, a = kappa, b = -(rate * kappa)

Shapes: B batch, H heads, L tokens, d head width; w is given as its logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    *,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in `scan.linear_scan`."""
    outputs = []
    for t in range(q.shape[2]):
        if document_starts is not None:
            state = torch.where(document_starts[:, t, None, None, None], 0.0, state)
        new = state
        if log_decay is not None:
            decay = log_decay[:, :, t].exp()
            new = state * (decay[..., None, None] if log_decay.dim() == 3 else decay[..., None])
        if a is not None and b is not None:
            new = new + b[:, :, t, :, None] * (a[:, :, t, None, :] @ state)
        state = new + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(q[:, :, t, None, :] @ state)
    return torch.cat(outputs, 2) if outputs else torch.zeros_like(v), state
