"""Attention over a window, documents and persistent keys without a mask in memory: PyTorch's FlexAttention.

Its kernels are made by torch.compile on a GPU, and skip blocks of keys that no query of a block sees. Persistent keys
have no place among the others: their part of the softmax is joined by the logarithm of the others' sum. attention.py
has the same in plain masks, and the legend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from titans_train.fusion import fused

if TYPE_CHECKING:
    from titans_train.models.attention import Persistent

BLOCK = 128  # queries, and keys, that its kernels take at a time


def attend(
    q: Tensor,
    plain: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Tensor | None,
    fixed: Persistent | None,
    window: int | None,
) -> Tensor:
    """q (rotated) and plain (not) [B, H, L, d]; keys, values [B, H, C + L, d]; documents [B, C + L] -> [B, H, L, d]."""
    cached, scale = keys.shape[2] - q.shape[2], q.shape[-1] ** -0.5

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = query + cached - key
        inside = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return inside if documents is None else inside & (documents[b, query + cached] == documents[b, key])

    blocks = visible_blocks(q.shape[2], keys.shape[2], window, q.device, seen, documents is None)
    function: Any = fused(flex_attention, q.device.type == "cuda")
    y, aux = function(q, keys, values, block_mask=blocks, scale=scale, return_aux=AuxRequest(lse=True))
    if fixed is None:
        return y
    scores = (plain @ fixed.keys.mT * scale).to(aux.lse.dtype)  # [B, H, L, P]
    log_sums = torch.logaddexp(aux.lse, scores.logsumexp(-1))[..., None]
    share = (aux.lse[..., None] - log_sums).exp().to(y.dtype)
    return y * share + (scores - log_sums).exp().to(y.dtype) @ fixed.values


def visible_blocks(
    length: int, total: int, window: int | None, device: torch.device, seen: Callable[..., Tensor], whole: bool
) -> BlockMask:
    """By arithmetic on blocks, (L / BLOCK)^2 numbers. whole: blocks within the window need no look at `seen`."""
    rows, cached = -(-length // BLOCK), total - length
    first_query = torch.arange(rows, device=device) * BLOCK + cached
    last_query = torch.clamp(first_query + BLOCK - 1, max=total - 1)
    reach = total if window is None else window
    first = torch.clamp(first_query - reach + 1, min=0) // BLOCK  # blocks of keys that some query sees
    last = last_query // BLOCK
    # blocks that every query sees whole
    full_first = torch.clamp(-(-(last_query - reach + 1) // BLOCK), min=0)
    full_last = (first_query + 1) // BLOCK - 1
    index = torch.arange(-(-total // BLOCK), device=device).expand(rows, -1)
    inside = (index >= first[:, None]) & (index <= last[:, None])
    full = inside & (index >= full_first[:, None]) & (index <= full_last[:, None]) if whole else inside & False
    counts, indices = _listed(inside & ~full, index)
    full_counts, full_indices = _listed(full, index)
    return BlockMask.from_kv_blocks(
        counts, indices, full_counts if whole else None, full_indices if whole else None, BLOCK_SIZE=BLOCK,
        mask_mod=seen, seq_lengths=(length, total),
    )  # fmt: skip


def _listed(chosen: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of chosen blocks per row, and all blocks with those first: int32 [1, 1, rows (, blocks)]."""
    order = chosen.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
    listed = index.gather(-1, order)
    return chosen.sum(-1, dtype=torch.int32)[None, None], listed.to(torch.int32)[None, None]
