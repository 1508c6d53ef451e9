"""Causal attention: over everything, or over a sliding window at O(length * window) cost.

Shape legend: B batch, L tokens, H heads, d head width, P persistent tokens, C cached keys, s block, w window.
A query sees the keys of its own document that are at most w - 1 tokens back, and every persistent key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.memory.layer import Inputs
from titans_train.models import flex
from titans_train.models.layers import rotate, turn
from titans_train.models.neighbours import UNCUT, Neighbours
from titans_train.models.parts import Parts
from titans_train.shape import ModelShape


@dataclass(frozen=True)
class AttentionState:
    """What a continuation sees: earlier keys (rotated) and values, which of them belong to the row's document."""

    keys: Tensor  # [B, H, C, d]
    values: Tensor  # [B, H, C, d]
    valid: Tensor  # [B, C] bool
    position: int  # of the next token, counted from where this call's sequence begins

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.valid

    def from_here(self, base: float) -> AttentionState:
        """The same with the next token at position 0: a new batch begins there."""
        back = torch.tensor([-self.position], dtype=torch.float64, device=self.keys.device)
        return AttentionState(turn(self.keys, back, base), self.values, self.valid, 0)


@dataclass(frozen=True)
class Persistent:
    """Keys and values [1, H, P, d] that every query sees. They carry no position."""

    keys: Tensor
    values: Tensor


def attention_sections(shape: ModelShape) -> dict[str, int]:
    """What attention is given, by name, and how wide."""
    return dict.fromkeys(("q", "k", "v"), shape.width)


class Attention:
    """Heads [B, L, H, d] of projected q, k, v [B, L, H d]; both projections belong to the block."""

    def __init__(self, shape: ModelShape, parts: Parts) -> None:
        self.heads, self.head_dim = parts.share(shape.heads), shape.head_dim
        self.window, self.base, self.compile = shape.attention.window, shape.attention.rope_base, shape.compile
        self.flex = shape.attention.kernels == "flex"

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def initial_state(self, x: Tensor, reach: int = 0) -> AttentionState:
        """x: [B, ...] of the model's dtype; reach: places for keys that are not there."""
        empty = x.new_zeros(x.shape[0], self.heads, reach, self.head_dim)
        return AttentionState(empty, empty, torch.zeros(x.shape[0], reach, dtype=torch.bool, device=x.device), 0)

    def persistent(self, given: Inputs | None) -> Persistent | None:
        """Keys and values of persistent tokens, projected: [1, P, H d]."""
        return None if given is None else Persistent(self.split(given["k"]), self.split(given["v"]))

    def __call__(
        self,
        given: Inputs,
        state: AttentionState | None = None,
        persistent: Inputs | None = None,
        document_starts: Tensor | None = None,
        across: Neighbours = UNCUT,
    ) -> tuple[Tensor, AttentionState]:
        """persistent: what is given of the persistent tokens. document_starts: [B, L] bool."""
        x = given["q"]
        state = self.initial_state(x, across.reach(self.window)) if state is None else state
        first = state.position + across.position
        plain, v = self.split(x), self.split(given["v"])
        k = rotate(self.split(given["k"]), first, self.base, self.compile)
        ready = self.window is not None and self.window - 1 <= k.shape[2]  # what goes on is of these tokens alone
        before = state if ready else self._before(across, state, first)
        after = self._after(before, k, v, document_starts, first)
        plain = across.send("window", plain, after.tensors())
        if ready:
            before = self._before(across, state, first)
        keys, values = torch.cat([before.keys.to(k.dtype), k], 2), torch.cat([before.values.to(v.dtype), v], 2)
        documents = _document_ids(before.valid, document_starts, k.shape[2])
        q, fixed = rotate(plain, first, self.base, self.compile), self.persistent(persistent)
        if self.flex and q.device.type == "cuda":
            y = flex.attend(q, plain, keys, values, documents, fixed, self.window)
        elif self.window is None:
            y = full_attention(q, plain, keys, values, documents, fixed)
        else:
            y = window_attention(q, plain, keys, values, documents, fixed, self.window)
        return y.transpose(1, 2), after

    def _before(self, across: Neighbours, state: AttentionState, first: int) -> AttentionState:
        keys, values, valid = across.receive("window", state.tensors())
        return AttentionState(keys, values, valid, first)

    def _after(self, before: AttentionState, k: Tensor, v: Tensor, starts: Tensor | None, first: int) -> AttentionState:
        """What the tokens to the right see: the last `window - 1` keys, those of the last token's document valid."""
        length = k.shape[2]
        total = before.keys.shape[2] + length
        keep = total if self.window is None else min(self.window - 1, total)

        def last(old: Tensor, new: Tensor) -> Tensor:
            if keep <= length:
                return new[:, :, length - keep :]
            return torch.cat([old.to(new.dtype), new], 2)[:, :, -keep:]

        documents = _document_ids(before.valid, starts, length)
        if documents is None:
            valid = torch.ones(k.shape[0], keep, dtype=torch.bool, device=k.device)
        else:
            valid = (documents == documents[:, -1:])[:, total - keep :]
        return AttentionState(last(before.keys, k), last(before.values, v), valid, first + length)


def _document_ids(valid: Tensor, document_starts: Tensor | None, length: int) -> Tensor | None:
    """Document number of every cached and new key, [B, C + L]; cached keys of other documents have -1.

    None where all belong together (on a CPU this is looked up; elsewhere only an empty cache is known to be so).
    """
    whole = valid.shape[1] == 0 or (valid.device.type == "cpu" and bool(valid.all()))
    if document_starts is None and whole:
        return None
    cached = torch.where(valid, 0, -1)
    if document_starts is None:
        return torch.cat([cached, cached.new_zeros(valid.shape[0], length)], 1)
    return torch.cat([cached, document_starts.to(cached.dtype).cumsum(1)], 1)


def full_attention(
    q: Tensor, plain: Tensor, keys: Tensor, values: Tensor, documents: Tensor | None, fixed: Persistent | None
) -> Tensor:
    """q (rotated) and plain (not) [B, H, L, d]; keys, values [B, H, C + L, d] -> [B, H, L, d]."""
    length, total = q.shape[2], keys.shape[2]
    if documents is None and fixed is None and total == length:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
    index = torch.arange(total, device=q.device)
    mask = (index <= index[total - length :, None])[None]
    if documents is not None:
        mask = mask & (documents[:, total - length :, None] == documents[:, None, :])
    return masked_attention(with_persistent(q, plain, fixed), keys, values, mask, fixed)


def with_persistent(q: Tensor, plain: Tensor, fixed: Persistent | None) -> Tensor:
    """Rotated queries with their scores against the persistent keys as P further features: [B, H, L, d + P].

    A persistent key has no position, so it must meet the query before its rotation: otherwise its weight would
    depend on how far the text has come. One attention call serves both kinds of keys when the scores ride along
    in features of their own, which persistent keys pick out by a one and other keys ignore by a zero.
    """
    if fixed is None:
        return q
    return torch.cat([q, plain @ fixed.keys.mT], dim=-1)


def masked_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, fixed: Persistent | None) -> Tensor:
    """q [B, H, L, d (+ P)] from `with_persistent`; keys, values [B, H, n, d]; mask [B or 1, L, n], true where seen."""
    d, scale = keys.shape[-1], keys.shape[-1] ** -0.5
    if fixed is not None:
        count = fixed.keys.shape[2]
        pick = F.pad(torch.eye(count, dtype=q.dtype, device=q.device), (d, 0)).expand(*keys.shape[:2], -1, -1)
        own = fixed.values.expand(keys.shape[0], -1, -1, -1)
        keys = torch.cat([pick, F.pad(keys, (0, count))], 2)
        values = F.pad(torch.cat([own, values], 2), (0, count))
        mask = F.pad(mask, (count, 0), value=True)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None], scale=scale)[..., :d]


def window_attention(
    q: Tensor,
    plain: Tensor,
    keys: Tensor,
    values: Tensor,
    documents: Tensor | None,
    fixed: Persistent | None,
    window: int,
) -> Tensor:
    """Blocks of s queries against the s + w - 1 keys they can reach: O(L (s + w)) with s about w.

    q, plain [B, H, L, d]; keys, values [B, H, C + L, d] with C <= w - 1; documents [B, C + L] or None.
    """
    q = with_persistent(q, plain, fixed)
    batch, heads, length, _ = q.shape
    cached = keys.shape[2] - length
    s = min(window, length)
    blocks = -(-length // s)
    before, after = window - 1 - cached, blocks * s - length
    reach = s + window - 1

    def to_blocks(x: Tensor) -> Tensor:
        """[B, H, C + L, d] -> [B * blocks, H, reach, d]"""
        x = F.pad(x, (0, 0, before, after)).unfold(2, reach, s)  # [B, H, blocks, d, reach]
        return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

    distance = torch.arange(s, device=q.device)[:, None] + window - 1 - torch.arange(reach, device=q.device)
    mask = (distance >= 0) & (distance < window)
    ids = torch.zeros(1, cached + length, dtype=torch.long, device=q.device) if documents is None else documents
    key_ids = F.pad(ids, (before, after), value=-2).unfold(1, reach, s)  # [rows, blocks, reach]
    query_ids = F.pad(ids[:, cached:], (0, after), value=-2).unflatten(1, (blocks, s))  # padding sees padding
    mask = mask & (key_ids[:, :, None, :] == query_ids[..., None])  # [rows, blocks, s, reach]
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)
    blocked = F.pad(q, (0, 0, 0, after)).unflatten(2, (blocks, s)).transpose(1, 2).flatten(0, 1)
    y = masked_attention(blocked, to_blocks(keys), to_blocks(values), mask, fixed)
    return y.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]
