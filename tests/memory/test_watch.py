"""Watching memories and switching them off: against autograd of the definition, and against zero gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.memory.layer import NeuralMemory
from titans_train.memory.recurrence import memory_mlp, recurrence
from titans_train.memory.scan import memory_scan
from titans_train.memory.state import MemoryState
from titans_train.memory.watch import memory_off, watching
from titans_train.models import LanguageModel

BLOCKS = ("lmm", "mac", "mag", "mal")
LENGTH, CHUNK = 27, 4  # ragged chunks, and ragged segments of 8


def build(block: str, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(block, **changes)).double().requires_grad_(False)


def text(length: int = LENGTH, seed: int = 1, batch: int = 1) -> Tensor:
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


def memories(model: LanguageModel) -> list[NeuralMemory]:
    return [m for m in model.modules() if isinstance(m, NeuralMemory)]


def in_pieces(model: LanguageModel, x: Tensor, sizes: list[int]) -> Tensor:
    state, outputs = None, []
    for piece in x.split(sizes, 1):
        out = model(piece, state=state, return_state=True)
        state = out.state
        outputs.append(out.logits)
    return torch.cat(outputs, 1)


class Spy:
    """Scans as ever; keeps what it was given of a text, [B, H, L, ...], and the state before it."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, ...]] = []
        self.state: MemoryState | None = None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, state: MemoryState, **o: Any
    ) -> tuple[Tensor, MemoryState]:
        self.state = self.state or state
        self.given.append((q, k, v, alpha, eta, theta))
        self.options = {name: o[name] for name in ("chunk_size", "activation", "gain", "bias", "base")}
        return memory_scan(q, k, v, alpha, eta, theta, state, **o)


def plain_surprise(spy: Spy) -> Tensor:
    """[H, L]: each token's gradient by autograd, at the weights that the definition has at the last chunk's end."""
    q, k, v, alpha, eta, theta = (torch.cat(parts, 2) for parts in zip(*spy.given, strict=True))
    mlp = {name: spy.options[name] for name in ("activation", "gain", "bias")}
    found = []
    for t in range(k.shape[2]):
        before = t // CHUNK * CHUNK
        weights = spy.state.weights
        if before:
            past = [x[:, :, :before] for x in (q, k, v, alpha, eta, theta)]
            weights = recurrence(*past, spy.state, **spy.options)[1].weights
        at = [w.detach().requires_grad_() for w in weights]
        loss = 0.5 * (memory_mlp(k[:, :, t : t + 1], at, **mlp) - v[:, :, t : t + 1]).square().sum()
        squares = [g.square().sum((-1, -2)) for g in torch.autograd.grad(loss, at)]
        found.append(torch.stack(squares).sum(0).sqrt()[0])
    return torch.stack(found, 1)


@pytest.mark.parametrize("block", BLOCKS)
def test_surprise_is_the_norm_of_the_definitions_gradient_and_gates_are_those_of_the_text(block: str) -> None:
    model, x = build(block), text()
    spies = [Spy() for _ in memories(model)]
    for memory, spy in zip(memories(model), spies, strict=True):
        memory.instead = spy
    model(x)
    with watching(model) as watches:
        model(x)
    for spy, watch in zip(spies, watches, strict=True):
        seen = watch.take()
        assert (seen["surprise"][0] - plain_surprise(spy)).abs().max() <= 1e-10
        for name, place in (("alpha", 3), ("eta", 4), ("theta", 5)):
            assert torch.allclose(seen[name], torch.cat([given[place] for given in spy.given], 2), rtol=1e-12), name
        assert seen["surprise"].shape == (1, 2, LENGTH) and seen["distance"].shape == (1, 2, LENGTH // CHUNK)
        assert watch.take() == {}


@pytest.mark.parametrize("block", BLOCKS)
def test_watching_changes_nothing_that_is_computed(block: str) -> None:
    model, x = build(block), text(batch=2)
    plain = in_pieces(model, x, [10, 1, 9, 7])
    with watching(model):
        watched = in_pieces(model, x, [10, 1, 9, 7])
    assert (watched - plain).abs().max() <= 1e-10
    assert all(memory.instead is None for memory in memories(model))


def test_documents_restart_the_memory_while_it_is_watched() -> None:
    model, x = build("mag"), text(24, batch=2)
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, [8, 16]] = starts[1, 12] = True
    plain = model(x, document_starts=starts).logits
    with watching(model) as watches:
        assert (model(x, document_starts=starts).logits - plain).abs().max() <= 1e-10
    whole = watches[1].take()["weight_norm"]
    with watching(model) as watches:
        model(x[1:, 12:])
    assert (whole[1:, :, 3:] - watches[1].take()["weight_norm"]).abs().max() <= 1e-10


def test_a_memory_without_gates_has_zeros_for_them() -> None:
    model, x = build("lmm", memory={"momentum": False, "forgetting": False, "write": False}), text()
    with watching(model) as watches:
        model(x)
    seen = watches[0].take()
    for name in ("alpha", "eta", "theta", "momentum_norm", "distance"):
        assert not seen[name].any(), name
    assert (seen["surprise"] > 0).all()


def gates_off(first: int) -> Callable[..., tuple[Tensor, MemoryState]]:
    """The definition with alpha, eta and theta 0 at the first tokens of a text."""
    seen = 0

    def scan(
        q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, eta: Tensor, theta: Tensor, state: MemoryState, **o: Any
    ) -> tuple[Tensor, MemoryState]:
        nonlocal seen
        keep = (torch.arange(seen, seen + q.shape[2]) >= first).to(q.dtype)
        seen += q.shape[2]
        kept = {name: o[name] for name in ("chunk_size", "activation", "gain", "bias", "base")}
        y, after = recurrence(q, k, v, alpha * keep, eta * keep, theta * keep, state, **kept)
        return y.detach(), after.detach()  # else autograd would follow MAC's keys, which depend on the weights

    return scan


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sizes", [[LENGTH], [10, 1, 9, 7]], ids=["whole", "pieces"])
def test_a_memory_switched_off_is_one_with_zero_gates(block: str, sizes: list[int]) -> None:
    model, x = build(block), text()
    before = model(x).logits
    with memory_off(model):
        off = in_pieces(model, x, sizes)
    assert torch.equal(model(x).logits, before)
    assert (off - before).abs().max() > 1e-3
    for memory in memories(model):
        memory.instead = gates_off(LENGTH)
    assert (off - model(x).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("first", [4, 6])
def test_a_text_begun_with_the_memory_off_goes_on_with_it(block: str, first: int) -> None:
    model, x = build(block, attention={"persistent_tokens": 0}), text()
    with memory_off(model):
        begun = model(x[:, :first], return_state=True)
    rest = model(x[:, first:], state=begun.state).logits
    for memory in memories(model):
        memory.instead = gates_off(first)
    assert (torch.cat([begun.logits, rest], 1) - model(x).logits).abs().max() <= 1e-10


@pytest.mark.parametrize("block", BLOCKS)
def test_a_memory_that_has_read_keeps_it_while_it_is_off(block: str) -> None:
    model, x = build(block), text()
    for size in (12, 14):
        state = model(x[:, :size], return_state=True).state
        with memory_off(model):
            after = model(x[:, size:], state=state, return_state=True).state
        for old, new in zip(state.blocks, after.blocks, strict=True):
            a, b = (s.memory.memory for s in (old, new))
            assert all(torch.equal(p, q) for p, q in zip(a.weights + a.momentum, b.weights + b.momentum, strict=True))
            assert b.offset == LENGTH % CHUNK


@pytest.mark.parametrize("block", BLOCKS)
def test_each_document_starts_afresh_with_the_memory_off(block: str) -> None:
    model, x = build(block), text(24)
    starts = torch.zeros(1, 24, dtype=torch.bool)
    starts[0, 8] = True
    state = model(text(8, seed=2), return_state=True).state
    with memory_off(model):
        both = model(x, document_starts=starts, state=state, return_state=True)
        alone = model(x[:, 8:], return_state=True)
    assert (both.logits[:, 8:] - alone.logits).abs().max() <= 1e-10
    for one, other in zip(both.state.blocks, alone.state.blocks, strict=True):
        a, b = (s.memory.memory.weights for s in (one, other))
        assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(a, b, strict=True))


def test_what_was_there_comes_back_after_an_error() -> None:
    model = build("mag")
    with watching(model) as watches:
        with pytest.raises(KeyError), memory_off(model):
            raise KeyError
        assert [m.instead for m in memories(model)] == watches
    assert all(m.instead is None for m in memories(model))


@pytest.mark.parametrize("block", ["transformer", "lmm-deltanet"])
def test_a_model_without_titans_memory_is_refused(block: str) -> None:
    model = LanguageModel(tiny(block))
    for switch in (memory_off, watching):
        with pytest.raises(ValueError, match="no Titans memory"), switch(model):
            pass
