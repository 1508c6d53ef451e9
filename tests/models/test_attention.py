"""Windowed and persistent attention against a dense reference, and its cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from titans_train.models.attention import Persistent, full_attention, window_attention


def reference(
    q: Tensor, plain: Tensor, k: Tensor, v: Tensor, ids: Tensor, fixed: Persistent | None, window: int
) -> Tensor:
    length, total = q.shape[2], k.shape[2]
    at = torch.arange(total)
    distance = at[total - length :, None] - at
    seen = (distance >= 0) & (distance < window) & (ids[:, total - length :, None] == ids[:, None])
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen[:, None], -torch.inf)
    if fixed is not None:
        scores = torch.cat([plain @ fixed.keys.mT / q.shape[-1] ** 0.5, scores], -1)
        v = torch.cat([fixed.values.expand(q.shape[0], -1, -1, -1), v], 2)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [1, 5, 8, 40, None])
@pytest.mark.parametrize("cached", [0, 3])
@pytest.mark.parametrize("persistent", [0, 3])
def test_attention_equals_the_dense_reference_with_gradients(window: int | None, cached: int, persistent: int) -> None:
    torch.manual_seed(0)
    length, cached = 21, min(cached, (window or 99) - 1)
    q, plain = (torch.randn(2, 2, length, 6).double().requires_grad_() for _ in range(2))
    k, v = (torch.randn(2, 2, cached + length, 6).double().requires_grad_() for _ in range(2))
    fixed = (
        Persistent(*(torch.randn(1, 2, persistent, 6).double().requires_grad_() for _ in range(2)))
        if persistent
        else None
    )
    ids = torch.zeros(2, cached + length, dtype=torch.long)
    ids[0, cached + 9 :] = 1
    ids[1, :cached] = -1
    leaves = [q, plain, k, v] + ([fixed.keys, fixed.values] if fixed else [])
    if window is None:
        y = full_attention(q, plain, k, v, ids, fixed)
    else:
        y = window_attention(q, plain, k, v, ids, fixed, window)
    want = reference(q, plain, k, v, ids, fixed, window or 99)
    cotangent = torch.randn_like(want)
    assert (y - want).abs().max() <= 1e-12
    got, expected = (torch.autograd.grad((o * cotangent).sum(), leaves, allow_unused=True) for o in (y, want))
    for a, b in zip(got, expected, strict=True):
        assert (a is None and b is None) or (a - b).abs().max() <= 1e-12


def test_window_attention_costs_length_times_window_forward_and_backward() -> None:
    def flops(length: int, window: int) -> int:
        q = torch.randn(1, 1, length, 16, requires_grad=True)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
            window_attention(q, q, q, q, None, None, window).sum().backward()
        return counter.get_total_flops()

    assert flops(4096, 64) > 0
    assert flops(4096, 64) == pytest.approx(4 * flops(1024, 64), rel=0.05)
    assert flops(4096, 128) == pytest.approx(2 * flops(4096, 64), rel=0.1)
