"""The scan equals the definition: outputs, final state and all gradients, in float64.

KERNELS=triton in the environment: of its kernels (test_kernels.py says so to Triton's interpreter).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from titans_train import memory
from titans_train.memory import MemoryState, recurrence

TOLERANCE = 1e-12
memory_scan = partial(memory.memory_scan, kernels=os.environ.get("KERNELS", "plain"))


@dataclass
class Case:
    """A call of the memory with leaf tensors, whose gradients are compared."""

    depth: int = 2
    length: int = 37
    chunk: int = 8
    batch: int = 2
    heads: int = 3
    d: int = 4
    hidden: int = 6
    activation: str = "silu"
    norm: bool = False
    momentum: bool = True
    forgetting: bool = True
    documents: bool = False
    gates: str = "random"
    base: bool = False
    leaves: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def build(self) -> Case:
        g = torch.Generator().manual_seed(0)

        def leaf(name: str, *shape: int, scale: float = 1.0, uniform: bool = False) -> None:
            make = torch.rand if uniform else torch.randn
            self.leaves[name] = (make(*shape, generator=g, dtype=torch.float64) * scale).requires_grad_()

        rows, b, n = (self.batch, self.heads, self.length), self.batch, self.heads
        for name in ("q", "k", "v"):
            leaf(name, *rows, self.d, scale=0.7)
        leaf("alpha", *rows, scale=0.1, uniform=True)
        leaf("eta", *rows, scale=0.8, uniform=True)
        leaf("theta", *rows, scale=0.1, uniform=True)
        if self.gates == "extreme":
            with torch.no_grad():
                for gate, values in (("alpha", (0.0, 1.0)), ("eta", (0.0, 1.0)), ("theta", (0.0, 0.1))):
                    pick = torch.rand(rows, generator=g)
                    self.leaves[gate][pick < 0.1], self.leaves[gate][pick > 0.9] = values
        if self.gates == "off":
            with torch.no_grad():
                for gate in ("alpha", "eta", "theta"):
                    self.leaves[gate].zero_()
        sizes = [self.d, *[self.hidden] * (self.depth - 1), self.d]
        for kind, batch in (("w", b), ("s", b), ("dw", 1), ("ds", 1)):
            for i in range(self.depth):
                leaf(f"{kind}{i}", batch, n, sizes[i], sizes[i + 1], scale=0.1 if kind in ("s", "ds") else 0.5)
        leaf("gain", n, self.d, scale=0.5)
        leaf("bias", n, self.d, scale=0.5)
        for i in range(self.depth if self.base else 0):
            leaf(f"b{i}", 1, n, sizes[i], sizes[i + 1], scale=0.5)
        return self

    def state(self, w: str = "w", s: str = "s") -> MemoryState:
        layers = range(self.depth)
        momentum = tuple(self.leaves[f"{s}{i}"] for i in layers) if self.momentum else ()
        return MemoryState(tuple(self.leaves[f"{w}{i}"] for i in layers), momentum)

    def starts(self) -> Tensor:
        starts = torch.zeros(self.batch, self.length, dtype=torch.bool)
        starts[0, self.chunk], starts[1, 3 * self.chunk], starts[1, 0] = True, True, True
        return starts

    def run(
        self, function: object, cuts: tuple[int, ...] = (), **options: int
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Outputs (y, final state) and gradients of a fixed random projection of them."""
        assert callable(function)
        x, state, ys = self.leaves, self.state(), []
        borders = [0, *cuts, self.length]
        for a, b in zip(borders, borders[1:], strict=False):
            documents: dict[str, Any] = {}
            if self.documents:
                starts = self.starts()[:, a:b].to(x["q"].device)
                documents = {"document_starts": starts, "document_state": self.state("dw", "ds")}
            if self.base:
                documents["base"] = tuple(x[f"b{i}"] for i in range(self.depth))
            gates = [
                x[name][:, :, a:b] if on else None for name, on in (("alpha", self.forgetting), ("eta", self.momentum))
            ]
            y, state = function(
                *(x[n][:, :, a:b] for n in "qkv"), *gates, x["theta"][:, :, a:b], state,
                chunk_size=self.chunk, activation=self.activation,
                gain=x["gain"] if self.norm else None, bias=x["bias"] if self.norm else None,
                **documents, **options,
            )  # fmt: skip
            ys.append(y)
        outputs = [torch.cat(ys, 2), *state.weights, *state.momentum, *(state.anchor or ())]
        g = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=g, dtype=torch.float64).to(o)).sum() for o in outputs)
        assert isinstance(loss, Tensor)
        gradients = torch.autograd.grad(loss, list(x.values()), allow_unused=True)
        return outputs, {n: t for n, t in zip(x, gradients, strict=True) if t is not None}


def assert_same(
    case: Case, got: tuple[list[Tensor], dict[str, Tensor]], want: tuple[list[Tensor], dict[str, Tensor]]
) -> None:
    assert len(got[0]) == len(want[0]) and got[1].keys() >= want[1].keys()
    pairs = [(f"output {i}", a, b) for i, (a, b) in enumerate(zip(got[0], want[0], strict=True))]
    pairs += [(f"gradient of {n}", got[1][n], want[1][n]) for n in want[1]]
    for name, a, b in pairs:
        assert torch.isfinite(a).all() and torch.isfinite(b).all(), name
        error = (a - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error <= TOLERANCE, f"{name}: {error:.1e} for {case}"


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_scan_equals_the_recurrence_at_every_depth(depth: int, norm: bool, activation: str) -> None:
    case = Case(depth=depth, norm=norm, activation=activation).build()
    assert_same(case, case.run(memory_scan, store_every=2), case.run(recurrence))


@pytest.mark.parametrize(
    "depth,norm,momentum,documents,cuts",
    [(2, True, True, True, ()), (1, False, True, False, ()), (2, False, False, True, (96 + 5,))],
)
def test_chunks_of_several_parts(
    depth: int, norm: bool, momentum: bool, documents: bool, cuts: tuple[int, ...]
) -> None:
    """Kernels walk over a chunk of so many tokens in parts, all of whose keys meet the weights before the chunk."""
    length, chunk = 4 * 96 + 5, 96
    case = Case(depth=depth, norm=norm, momentum=momentum, documents=documents, length=length, chunk=chunk).build()
    with torch.no_grad():
        case.leaves["theta"].mul_(8 / chunk)  # as much to a chunk as others have
    assert_same(case, case.run(memory_scan, cuts, store_every=2), case.run(recurrence, cuts))


@pytest.mark.parametrize("length,chunk", [(1, 1), (5, 8), (8, 8), (16, 8), (23, 8), (7, 1), (33, 16)])
def test_scan_equals_the_recurrence_at_ragged_lengths(length: int, chunk: int) -> None:
    case = Case(length=length, chunk=chunk, norm=True).build()
    assert_same(case, case.run(memory_scan), case.run(recurrence))


@pytest.mark.parametrize("gates", ["extreme", "off"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_gates_at_exactly_zero_and_one_are_exact_with_finite_gradients(gates: str, norm: bool) -> None:
    case = Case(gates=gates, norm=norm).build()
    assert_same(case, case.run(memory_scan), case.run(recurrence))


@pytest.mark.parametrize("momentum,forgetting", [(False, True), (True, False), (False, False)])
def test_momentum_and_forgetting_can_be_switched_off(momentum: bool, forgetting: bool) -> None:
    case = Case(momentum=momentum, forgetting=forgetting, norm=True).build()
    assert_same(case, case.run(memory_scan), case.run(recurrence))


@pytest.mark.parametrize("cuts", [(8,), (3,), (11,), (5, 7), (1, 2, 3, 20)], ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_a_sequence_split_into_calls_equals_one_call(cuts: tuple[int, ...], norm: bool) -> None:
    case = Case(norm=norm).build()
    whole = case.run(recurrence)
    assert_same(case, case.run(memory_scan, cuts), whole)
    assert_same(case, case.run(recurrence, cuts), whole)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("cuts", [(), (8,), (13,)], ids=str)
def test_documents_take_their_own_state_at_chunk_borders(momentum: bool, cuts: tuple[int, ...]) -> None:
    case = Case(documents=True, momentum=momentum, norm=True).build()
    assert_same(case, case.run(memory_scan, cuts, store_every=2), case.run(recurrence, cuts))


@pytest.mark.parametrize("depth,norm", [(1, False), (2, True), (3, False), (4, True)])
@pytest.mark.parametrize("cuts", [(), (8,), (3, 20)], ids=str)
def test_forgetting_can_lead_to_a_base(depth: int, norm: bool, cuts: tuple[int, ...]) -> None:
    case = Case(base=True, depth=depth, norm=norm).build()
    want = case.run(recurrence)
    assert_same(case, case.run(memory_scan, cuts, store_every=2), want)
    assert want[1]["b0"].abs().max() > 1e-3


@pytest.mark.parametrize("options", [
    {"momentum": False}, {"gates": "extreme"}, {"gates": "off"}, {"length": 7, "chunk": 1},
    {"documents": True}, {"documents": True, "momentum": False, "activation": "gelu"},
], ids=str)  # fmt: skip
def test_a_base_goes_with_everything_else(options: dict[str, Any]) -> None:
    case = Case(base=True, norm=True, **options).build()
    assert_same(case, case.run(memory_scan, store_every=2), case.run(recurrence))


def test_with_a_base_of_zeros_nothing_changes() -> None:
    case = Case(base=True, norm=True).build()
    with torch.no_grad():
        for i in range(case.depth):
            case.leaves[f"b{i}"].zero_()
    other = Case(norm=True).build()
    got, want = case.run(memory_scan), other.run(recurrence)
    assert_same(case, (got[0], {n: g for n, g in got[1].items() if n in want[1]}), want)


@pytest.mark.parametrize("store_every", [1, 3, 100])
def test_how_often_states_are_stored_changes_nothing(store_every: int) -> None:
    case = Case(depth=3).build()
    assert_same(case, case.run(memory_scan, store_every=store_every), case.run(recurrence))


def test_a_document_inside_a_chunk_is_refused_with_its_position() -> None:
    case = Case(documents=True).build()
    case.starts = lambda: torch.zeros(2, 37, dtype=torch.bool).index_fill(1, torch.tensor([5]), True)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="token 5 of row 0"):
        case.run(memory_scan)


def test_a_state_survives_a_file(tmp_path: object) -> None:
    case = Case(length=11).build()
    x = case.leaves
    state = case.state()
    _, state = memory_scan(*(x[n] for n in ("q", "k", "v", "alpha", "eta", "theta")), state, chunk_size=8)
    state.save(f"{tmp_path}/state.safetensors")
    loaded = MemoryState.load(f"{tmp_path}/state.safetensors")
    assert loaded.offset == state.offset == 3
    pairs = zip(
        (*loaded.weights, *loaded.momentum, *loaded.anchor),
        (*state.weights, *state.momentum, *state.anchor),
        strict=True,
    )  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in pairs)
