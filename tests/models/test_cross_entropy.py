"""Cross-entropy in blocks equals PyTorch's, also over a split vocabulary, and keeps no float32 copy of the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.models import cross_entropy
from titans_train.models.cross_entropy import token_losses


def given(dtype: torch.dtype, tokens: int = 37, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(tokens, width, generator=g, dtype=torch.float64) * 4).to(dtype)
    logits[:, width - 3 :] = -torch.inf
    labels = torch.randint(width - 3, (tokens,), generator=g)
    labels[::5] = -100
    return logits.requires_grad_(), labels, torch.rand(tokens, generator=g, dtype=torch.float64)


@pytest.fixture(params=[50, 1 << 22], ids=["blocks of 2 tokens", "one block"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "BLOCK", request.param)


def test_losses_and_gradients_are_those_of_pytorch_in_float64(block: None) -> None:
    logits, labels, weights = given(torch.float64)
    want = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    (d_want,) = torch.autograd.grad((want * weights).sum(), logits)
    got = token_losses(logits, labels)
    (d_got,) = torch.autograd.grad((got * weights).sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(d_got, d_want, rtol=1e-13, atol=1e-13)
    assert torch.isfinite(d_got).all() and (d_got[::5] == 0).all()


def test_bfloat16_logits_are_widened_and_their_gradient_rounded_once() -> None:
    logits, labels, weights = given(torch.bfloat16)
    wide = logits.detach().double().requires_grad_()
    want = F.cross_entropy(wide, labels, reduction="none", ignore_index=-100)
    (d_want,) = torch.autograd.grad((want * weights).sum(), wide)
    got = token_losses(logits, labels)
    (d_got,) = torch.autograd.grad((got * weights.float()).sum(), logits)
    assert got.dtype == torch.float32 and d_got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_got.double(), d_want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shares", [2, 4])
def test_shares_of_a_vocabulary_give_the_whole(shares: int) -> None:
    """One call per share, in step: each is given what all of them combine to."""
    logits, labels, weights = given(torch.float64)
    want = token_losses(logits, labels)
    (d_want,) = torch.autograd.grad((want * weights).sum(), logits)
    width = logits.shape[1] // shares
    parts = [x.detach().clone().requires_grad_() for x in logits.split(width, 1)]
    calls: list[list[Tensor]] = []

    def run(combined: list[Tensor]) -> list[Tensor]:
        """Every share's losses, where the combinations are known so far."""
        found = []
        for index, part in enumerate(parts):
            number = iter(range(2))

            def combine(x: Tensor, how: str, number: object = number) -> None:
                n = next(number)  # type: ignore[call-overload]
                calls[n].append(x.clone())
                if n < len(combined):
                    x.copy_(combined[n])

            found.append(token_losses(part, labels, index * width, combine))
        return found

    combined: list[Tensor] = []
    for how in (lambda x: x.amax(0), lambda x: x.sum(0)):
        calls[:] = [[], []]
        run(combined)
        combined.append(how(torch.stack(calls[len(combined)])))
    calls[:] = [[], []]
    losses = run(combined)
    for got in losses:
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    d_parts = [torch.autograd.grad((got * weights).sum(), part)[0] for got, part in zip(losses, parts, strict=True)]
    torch.testing.assert_close(torch.cat(d_parts, 1), d_want, rtol=1e-13, atol=1e-13)


def test_what_is_kept_is_the_logits_and_a_few_numbers_per_token() -> None:
    logits, labels, _ = given(torch.bfloat16, tokens=64, width=4096)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        token_losses(logits, labels)
    others = [t for t in kept if t.data_ptr() != logits.data_ptr()]
    assert len(others) < len(kept) and sum(t.numel() for t in others) <= 5 * 64


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_float32_gradients_are_as_exact_as_pytorchs_wherever_the_logits_lie(offset: float) -> None:
    logits, labels, weights = given(torch.float64)
    logits = (logits.detach() + offset).float().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad((F.cross_entropy(wide, labels, reduction="none") * weights).sum(), wide)

    def error(losses: Tensor) -> float:
        (gradient,) = torch.autograd.grad((losses * weights.float()).sum(), logits)
        return float((gradient.double() - exact).norm() / exact.norm())

    assert error(token_losses(logits, labels)) <= 4 * error(F.cross_entropy(logits, labels, reduction="none"))


def test_a_label_beyond_the_vocabulary_is_no_number() -> None:
    logits, labels, _ = given(torch.float32)
    labels[1] = logits.shape[1]
    losses = token_losses(logits, labels)
    assert losses[1].isnan() and losses[2:].isfinite().all()
