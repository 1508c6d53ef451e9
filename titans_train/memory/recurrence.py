"""The definition, token by token: slow, plain, and the reference of every faster form.

    S_t = eta_t S_{t-1} - theta_t grad l(W_a; k_t, v_t)        l = 1/2 |M_{W_a}(k_t) - v_t|^2
    W_t = (1 - alpha_t) W_{t-1} + alpha_t W_b + S_t             a = last token of the previous chunk
    y_t = M_{W_t}(q_t)                                          write, then read

(Titans paper, eq. 8-15, with every gradient of a chunk taken at the same anchor, section 3.2. W_b, `base`, is what
forgetting leads to: zero in the paper, or the learned start.)
The inner gradient comes from autograd here, on purpose: the closed forms of the scan are checked against it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.memory.state import MemoryState, Weights

# Of the layer norm inside the memory. It bounds the norm's slope, 1 / sqrt(var + eps), and with it the curvature of
# the inner loss. At 1e-5 a fresh memory's slope is near 100, and a sequence of equal keys had gradients of 1e5 and
# more; at 1e-2 they stay at the size of a text's (README, "Does it train?").
NORM_EPS = 1e-2


def memory_mlp(x: Tensor, weights: Weights, activation: str, gain: Tensor | None, bias: Tensor | None) -> Tensor:
    """M_W(x): [batch, heads, tokens, d] -> the same shape. With a gain: x + gain * LayerNorm(MLP(x)) + bias."""
    act: Callable[[Tensor], Tensor] = F.silu if activation == "silu" else F.gelu
    h = x
    for n, w in enumerate(weights):
        h = (act(h) if n else h) @ w
    if gain is None:
        return h
    assert bias is not None
    return x + F.layer_norm(h, h.shape[-1:], eps=NORM_EPS) * gain[:, None] + bias[:, None]


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    activation: str = "silu",
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    document_starts: Tensor | None = None,
    document_state: MemoryState | None = None,
    base: Weights | None = None,
) -> tuple[Tensor, MemoryState]:
    """Writes and reads every token in turn. Arguments and results as in `memory_scan`."""
    weights, momentum = state.weights, state.momentum or tuple(torch.zeros_like(w) for w in state.weights)
    anchor, offset = state.anchor, state.offset
    to = base or tuple(torch.zeros_like(w) for w in weights)
    outputs = []
    for t in range(q.shape[2]):
        if document_starts is not None:
            if offset and bool(document_starts[:, t].any()):
                raise ValueError(f"a document starts at token {t}, {offset} tokens into a chunk of {chunk_size}")
            assert document_state is not None
            row = document_starts[:, t, None, None, None]
            weights = tuple(torch.where(row, d, w) for d, w in zip(document_state.weights, weights, strict=True))
            if document_state.momentum:
                momentum = tuple(torch.where(row, d, s) for d, s in zip(document_state.momentum, momentum, strict=True))
        if offset == 0:
            anchor = weights
        assert anchor is not None

        def gate(g: Tensor | None, t: int = t) -> Tensor | float:
            return 0.0 if g is None else g[:, :, t, None, None]

        kt, vt, qt = (x[:, :, t : t + 1] for x in (k, v, q))
        at = anchor if anchor[0].requires_grad else tuple(w.detach().requires_grad_() for w in anchor)
        with torch.enable_grad():
            loss = 0.5 * (memory_mlp(kt, at, activation, gain, bias) - vt).square().sum()
            gradients = torch.autograd.grad(loss, at, create_graph=True)
        momentum = tuple(gate(eta) * s - gate(theta) * g for s, g in zip(momentum, gradients, strict=True))
        weights = tuple(
            (1 - gate(alpha)) * w + gate(alpha) * b + s for w, b, s in zip(weights, to, momentum, strict=True)
        )
        outputs.append(memory_mlp(qt, weights, activation, gain, bias))
        offset = (offset + 1) % chunk_size
    final = MemoryState(weights, () if eta is None else momentum, anchor if offset else None, offset)
    return torch.cat(outputs, dim=2), final
