"""The linear recurrence of recurrence.py in chunks: matrix products within a chunk, a loop over chunks for the state.

With c_t the sum of the logarithms of the decays of a chunk's tokens up to t, and u_t = a_t^T S_{t-1},

    S_t = e^{c_t} S_0 + sum_{i <= t} e^{c_t - c_i} (b_i u_i + k_i v_i^T)
    u_t = a_t^T (e^{c_{t-1}} S_0 + sum_{i < t} e^{c_{t-1} - c_i} (b_i u_i + k_i v_i^T))

The second line is a unit triangular system for the u of a chunk, solved for all chunks at once (the WY form of arXiv
2406.06484 and 2412.06464, with decays). Exponents are never positive where one decay serves all channels of a head;
with decays per channel both factors of e^{c_t} e^{-c_i} are needed, so that such a chunk must be short.

Shapes: B batch, H heads, n chunks of T tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class _Decays:
    """Of the tokens of all chunks: c_t and c_{t-1}, [B, H, n, T, 1 or d], and whether they differ by channel."""

    through: Tensor
    before: Tensor
    by_channel: bool

    @classmethod
    def of(cls, log_decay: Tensor) -> _Decays:
        """log_decay: [B, H, n, T] or [B, H, n, T, d]"""
        by_channel = log_decay.dim() == 5
        steps = log_decay if by_channel else log_decay[..., None]
        through = steps.cumsum(-2)
        return cls(through, through - steps, by_channel)

    @property
    def end(self) -> Tensor:
        """[B, H, n, 1, 1 or d]"""
        return self.through[..., -1:, :]

    def products(self, x: Tensor, y: Tensor, itself: bool) -> Tensor:
        """sum_c x_t y_i e^{c_t - c_i} for i <= t, or with c_{t-1} for i < t where not `itself`: [B, H, n, T, T]."""
        at = self.through if itself else self.before
        seen = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril(0 if itself else -1)
        if self.by_channel:
            return ((x * at.exp()) @ (y * (-self.through).exp()).mT).masked_fill(~seen, 0.0)
        exponents = (at - self.through.mT).masked_fill(~seen, -torch.inf)
        return (x @ y.mT) * exponents.exp()


def linear_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    state: Tensor,
    *,
    chunk_size: int,
    document_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T; y_t = S_t^T q_t.

    q, k, v, a, b: [B, H, L, d]; a and b None: no such term. log_decay: log w_t <= 0, [B, H, L], or [B, H, L, d] by
    channel; None: w = 1. state: S before the first token, [B, H, d, d]. chunk_size changes speed, not results.
    document_starts: [B, L] bool, true only at multiples of chunk_size; there S is zero.

    Returns y [B, H, L, d] and S after the last token, in float32, or float64 for float64 inputs. ValueError: a start
    elsewhere.
    """
    length, dtype = q.shape[2], torch.promote_types(torch.promote_types(q.dtype, torch.float32), state.dtype)
    if length == 0:
        return torch.zeros_like(v), state
    size = min(chunk_size, length)
    starts = _starts_of_chunks(document_starts, size, length)

    def chunked(x: Tensor | None) -> Tensor | None:
        """[B, H, L, ...] -> [B, H, n, T, ...]; tokens of zeros leave the state as it is."""
        if x is None:
            return None
        x = x.to(dtype)
        padding = -length % size
        if padding:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], padding, *x.shape[3:])], 2)
        return x.unflatten(2, (-1, size))

    q, k, v = chunked(q), chunked(k), chunked(v)  # type: ignore[assignment]
    a, b = chunked(a), chunked(b)
    given = chunked(log_decay)
    decays = _Decays.of(q.new_zeros(q.shape[:-1]) if given is None else given)
    from_state, own = q * decays.through.exp(), decays.products(q, k, itself=True) @ v
    to_end = (decays.end - decays.through).exp()
    written = (k * to_end).mT @ v
    kept = decays.end.exp().mT  # [B, H, n, 1 or d, 1]
    if a is not None and b is not None:
        system = decays.products(a, b, itself=False)
        eye = torch.eye(size, dtype=dtype, device=q.device)
        right = torch.cat([a * decays.before.exp(), decays.products(a, k, itself=False) @ v], -1)
        solved = torch.linalg.solve_triangular(eye - system, right, upper=False, unitriangular=True)
        u_state, u_own = solved.split([a.shape[-1], v.shape[-1]], -1)
        # u is linear in S_0: so are the outputs and the end, which leaves one product per chunk and use to the loop
        through_u, to_b = decays.products(q, b, itself=True), (b * to_end).mT
        from_state, own = from_state + through_u @ u_state, own + through_u @ u_own
        written = written + to_b @ u_own
        moved = to_b @ u_state  # [B, H, n, d, d]
    else:
        moved = None
    state, outputs = state.to(dtype), []
    for j in range(q.shape[2]):
        if starts is not None:
            state = torch.where(starts[:, j, None, None, None], 0.0, state)
        outputs.append(torch.matmul(from_state[:, :, j], state))
        new = kept[:, :, j] * state + written[:, :, j]
        state = new if moved is None else new + moved[:, :, j] @ state
    y = own + torch.stack(outputs, 2)
    return y.flatten(2, 3)[:, :, :length], state


def _starts_of_chunks(document_starts: Tensor | None, size: int, length: int) -> Tensor | None:
    """[B, L] -> [B, n]"""
    if document_starts is None:
        return None
    padded = F.pad(document_starts, (0, -length % size)).unflatten(1, (-1, size))
    if padded.device.type == "cpu" and bool(padded[..., 1:].any()):
        raise ValueError(f"a document starts at a multiple of {size} tokens; pad the one before up to there")
    return padded[..., 0]
