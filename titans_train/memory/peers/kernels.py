"""Which implementation does a scan: scan.py's, or on a GPU the kernels of flash-linear-attention (extra `peers`).

    delta rule (`beta` given)      chunk_delta_rule, or with decays chunk_gated_delta_rule
    no a and b                     chunk_simple_gla
    decays by channel, a and b     chunk_dplr_delta_rule (chunk_rwkv7 is that with other names)

The backward is theirs too. They multiply in the model's dtype (float32 as TF32 where the GPU has it) and keep states
and decays in float32. Their tensors are [B, L, H, d]; documents are a flattened batch with the bounds of its sequences.

Shapes: B batch, H heads, L tokens, d head width, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.memory.peers.scan import linear_scan
from titans_train.shape import KERNEL_WIDTHS

MODULES = {
    "chunk_delta_rule": "delta_rule", "chunk_gated_delta_rule": "gated_delta_rule", "chunk_simple_gla": "simple_gla",
    "chunk_dplr_delta_rule": "generalized_delta_rule",
}  # fmt: skip
LEAST_LOG_DECAY = -1.0  # by channel: RWKV-7's are above -e^-1/2; knowing it, theirs is faster and a little less exact


@dataclass(frozen=True)
class Terms:
    """Of S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T; y_t = S_t^T q_t, as for `scan.linear_scan`.

    With beta, [B, H, L], the delta rule: v stands for beta v, a = k, b = -beta w k, and w is 1 or one per head.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    beta: Tensor | None = None

    def general(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """q, k, v, log_decay, a, b with beta multiplied in."""
        if self.beta is None:
            return self.q, self.k, self.v, self.log_decay, self.a, self.b
        beta = self.beta[..., None]
        kept = beta if self.log_decay is None else beta * self.log_decay.exp()[..., None]
        return self.q, self.k, beta * self.v, self.log_decay, self.k, -kept * self.k


def scan(
    terms: Terms, state: Tensor, *, chunk_size: int, document_starts: Tensor | None, kernels: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Arguments and results as `scan.linear_scan`; kernels: memory.peer_kernels; dtype: the model's."""
    if uses_fla(kernels, terms.q, dtype):
        return fla_scan(terms, state, document_starts, dtype)
    return linear_scan(*terms.general(), state, chunk_size=chunk_size, document_starts=document_starts)


def uses_fla(kernels: str, q: Tensor, dtype: torch.dtype) -> bool:
    """By itself for 16-bit models only: in float32 theirs are less exact than scan.py."""
    wanted = {"plain": False, "auto": dtype.itemsize == 2, "fla": dtype.itemsize <= 4}[kernels]
    return wanted and q.is_cuda and q.shape[2] > 0 and q.shape[-1] in KERNEL_WIDTHS and _unusable() is None


def check(kernels: str) -> None:
    """UserError where "fla" is asked for and cannot be had; for a training to ask before it starts.

    Models without it run as scan.py: a checkpoint is used on machines that it was not trained on.
    """
    reason = _unusable() if kernels == "fla" else None
    if reason is not None:
        raise UserError(f"memory.peer_kernels is fla, but {reason}; or use auto or plain")


@cache
def _unusable() -> str | None:
    """Why their kernels cannot run on this machine, with a remedy."""
    if not torch.cuda.is_available():
        return "there is no CUDA device: start on a machine with one"
    try:
        _function("chunk_simple_gla")
        from fla import utils
    except ImportError as error:
        return f"flash-linear-attention cannot be imported ({error}): install the extra peers (fla-core, and Triton)"
    if utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1:
        return "Triton 3.4 to 3.7.0 gives wrong gradients on Hopper GPUs: install Triton 3.7.1 or later"
    return None


def _function(name: str) -> Any:
    """Imported where it is used: without a GPU there is no Triton, which it wants."""
    return getattr(import_module(f"fla.ops.{MODULES[name]}"), name)


def handed(terms: Terms, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """The name of their function, and its arguments beside states and documents."""
    exact = torch.promote_types(dtype, torch.float32)  # of what they take in any precision

    def laid(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.transpose(1, 2).to(dtype)

    given: dict[str, Any] = {name: laid(getattr(terms, name), dtype) for name in ("q", "k", "v")}
    decay = None if terms.log_decay is None else laid(terms.log_decay, exact)
    given["scale"] = 1.0
    if terms.beta is not None:
        given["beta"] = laid(terms.beta, exact)
        if decay is None and dtype != torch.float32:
            return "chunk_delta_rule", given  # it refuses float32
        return "chunk_gated_delta_rule", {**given, "g": torch.zeros_like(given["beta"]) if decay is None else decay}
    if terms.a is None or terms.b is None:
        assert decay is None or decay.dim() == 3
        return "chunk_simple_gla", {**given, "g": decay}
    assert decay is not None and decay.dim() == 4
    bound = LEAST_LOG_DECAY if dtype.itemsize == 2 else None
    given |= {"a": laid(terms.a, dtype), "b": laid(terms.b, dtype), "gk": decay, "lower_bound": bound}
    return "chunk_dplr_delta_rule", given


def fla_scan(terms: Terms, state: Tensor, document_starts: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Results as `scan.linear_scan`, in float32. Waits for the GPU where there are documents."""
    name, given = handed(terms, dtype)
    before, last = state.float(), None
    if document_starts is not None:
        given = {n: x.flatten(0, 1)[None] if isinstance(x, Tensor) else x for n, x in given.items()}
        given["cu_seqlens"], before, last = sequences(document_starts, before)
    y, after = _function(name)(**given, initial_state=before, output_final_state=True)
    batch, heads, length, _ = terms.v.shape
    y = y.reshape(batch, length, heads, -1).transpose(1, 2).float()
    return y, after if last is None else after[last]


def sequences(document_starts: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the flattened batch, cut where a row or a document starts: bounds [N + 1], states before [N, H, d, d], and
    which sequences end the rows, [B].
    """
    batch, length = document_starts.shape
    cuts = document_starts.clone()
    cuts[:, 0] = True
    starts, last = cuts.flatten().nonzero()[:, 0], cuts.sum(1).cumsum(0) - 1
    first = torch.cat([last.new_zeros(1), last[:-1] + 1])
    own = torch.where(document_starts[:, 0, None, None, None], 0.0, state)
    before = state.new_zeros(len(starts), *state.shape[1:]).index_copy(0, first, own)
    return torch.cat([starts, starts.new_full((1,), batch * length)]), before, last
