"""FlexAttention equals attention with masks: forward on a CPU, where it has no backward; all gradients on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from titans_train.models.attention import Persistent, full_attention, window_attention
from titans_train.models.flex import BLOCK, attend, visible_blocks

CASES = [  # tokens, cached keys, window, with documents, persistent keys
    (300, 0, 100, False, 0), (300, 99, 100, True, 3), (260, 40, 130, True, 4), (300, 0, None, True, 3),
    (520, 0, None, False, 3), (513, 200, 384, False, 2),
]  # fmt: skip


class Inputs:
    def __init__(self, case: tuple[int, int, int | None, bool, int], device: str, grad: bool) -> None:
        length, cached, self.window, documents, count = case
        g = torch.Generator().manual_seed(0)

        def rows(batch: int, tokens: int) -> Tensor:
            made = torch.randn(batch, 2, tokens, 16, generator=g, dtype=torch.float64 if device == "cpu" else None)
            return made.to(device).requires_grad_(grad)

        self.q, self.plain = rows(2, length), rows(2, length)
        self.keys, self.values = rows(2, cached + length), rows(2, cached + length)
        self.fixed = Persistent(rows(1, count), rows(1, count)) if count else None
        starts = torch.rand(2, cached + length, generator=g) < 0.02
        self.documents = starts.cumsum(1).to(device) if documents else None

    def masked(self) -> Tensor:
        given = self.q, self.plain, self.keys, self.values, self.documents, self.fixed
        return full_attention(*given) if self.window is None else window_attention(*given, self.window)

    def flex(self) -> Tensor:
        return attend(self.q, self.plain, self.keys, self.values, self.documents, self.fixed, self.window)

    def leaves(self) -> list[Tensor]:
        found = [self.q, self.keys, self.values]
        return found if self.fixed is None else [*found, self.plain, self.fixed.keys, self.fixed.values]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_sees_what_the_masks_let_through(case: tuple[int, int, int | None, bool, int]) -> None:
    given = Inputs(case, "cpu", grad=False)
    torch.testing.assert_close(given.flex(), given.masked(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_listed_that_are_seen_at_all_and_full_ones_that_are_seen_whole(
    case: tuple[int, int, int | None, bool, int],
) -> None:
    """Its kernels look at listed blocks only, and at full ones without asking what is seen there."""
    length, cached, window, *_ = case
    total = cached + length
    distance = torch.arange(length)[:, None] + cached - torch.arange(total)
    mask = (distance >= 0) & (distance < (total if window is None else window))
    pad = (0, -total % BLOCK, 0, -length % BLOCK)

    def tiles(x: Tensor, value: bool) -> Tensor:
        x = torch.nn.functional.pad(x, pad, value=value)
        return x.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, blocks, BLOCK]

    some, every = tiles(mask, False).any(3).any(1), tiles(mask, True).all(3).all(1)
    blocks = visible_blocks(length, total, window, torch.device("cpu"), lambda b, h, q, k: q >= k, whole=True)

    def listed(numbers: Tensor | None, indices: Tensor | None, row: int) -> set[int]:
        assert numbers is not None and indices is not None
        return set(indices[0, 0, row, : int(numbers[0, 0, row])].tolist())

    for row in range(len(some)):
        full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices, row)
        partial = listed(blocks.kv_num_blocks, blocks.kv_indices, row)
        assert full | partial == set(some[row].nonzero()[:, 0].tolist()) and not full & partial
        assert full <= set(every[row].nonzero()[:, 0].tolist())  # the ragged last one is looked at
    if length > 2 * BLOCK and (window or total) > 2 * BLOCK:
        assert int(blocks.full_kv_num_blocks.sum()) > 0  # type: ignore[union-attr]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_outputs_and_gradients_equal_those_of_masks(case: tuple[int, int, int | None, bool, int]) -> None:
    given = Inputs(case, "cuda", grad=True)
    want, got = given.masked(), given.flex()
    g = torch.randn_like(want)
    pairs = zip(
        [got, *torch.autograd.grad(got, given.leaves(), g)], [want, *torch.autograd.grad(want, given.leaves(), g)],
        strict=True,
    )  # fmt: skip
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
