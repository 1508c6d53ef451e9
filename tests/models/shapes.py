"""Tiny architectures for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from titans_train.shape import AttentionShape, MemoryShape, ModelShape

MEMORY = MemoryShape(
    rule="titans", chunk_size=4, depth=2, hidden=12, activation="silu", residual_norm=True, momentum=True,
    forgetting=True, forget_to="zero", write=True, normalize_values=True, convolution=4, key_start="token",
    gate="memory", theta_max=1.0, couple_theta=True, forget_bias=-3.0, momentum_bias=0.0, theta_bias=0.0, store_every=2,
)  # fmt: skip
PEER = {
    "depth": 1, "hidden": 8, "residual_norm": False, "momentum": False, "forgetting": False, "forget_to": "zero",
    "normalize_values": False, "store_every": 1,
}  # fmt: skip
ATTENTION = AttentionShape(window=6, segment=8, residual=True, persistent_tokens=3, rope_base=10000.0)
SHAPE = ModelShape(
    block="mag", layers=2, width=16, heads=2, head_dim=8, vocabulary=29, padded_vocabulary=32,
    feed_forward=24, tied_head=True,
    norm_eps=1e-5, initializer_std=0.2, memory=MEMORY, attention=ATTENTION,
)  # fmt: skip


def tiny(
    block: str, *, memory: dict[str, Any] | None = None, attention: dict[str, Any] | None = None, **model: Any
) -> ModelShape:
    """A small model of the given block, "block" or "block-rule"; keyword arguments replace fields.

    The table is padded to a multiple of 8.
    """
    block, _, rule = block.partition("-")
    if rule:
        memory, attention = {"rule": rule, **PEER, **(memory or {})}, {"persistent_tokens": 0, **(attention or {})}
    if "vocabulary" in model:
        model["padded_vocabulary"] = -(-model["vocabulary"] // 8) * 8
    if block == "transformer":
        attention = {"window": None} | (attention or {})
        return replace(SHAPE, block=block, memory=None, attention=replace(ATTENTION, **attention), **model)
    shape = replace(SHAPE, block=block, **model)
    return replace(shape, memory=replace(MEMORY, **(memory or {})), attention=replace(ATTENTION, **(attention or {})))
