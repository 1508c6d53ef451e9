"""The affine form of a linear memory equals its scan: states, compositions and gradients, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titans_train.memory import MemoryState, memory_scan
from titans_train.memory.activation import ACTIVATIONS
from titans_train.memory.affine import Affine, shard_map, start_adjoint
from titans_train.memory.chunk import Norm
from titans_train.memory.walk import Segment, Sequence, chunk_grid

TOLERANCE = 1e-12
BATCH, HEADS = 3, 2  # documents start in some of the batch rows


@dataclass(frozen=True)
class Case:
    length: int = 37
    chunk: int = 8
    d: int = 4
    momentum: bool = True
    forgetting: bool = True
    gates: str = "random"
    documents: bool = False
    store_every: int = 2
    x: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __str__(self) -> str:
        switches = [name for name in ("momentum", "forgetting", "documents") if getattr(self, name)]
        return "-".join([f"L{self.length}", f"b{self.chunk}", f"d{self.d}", self.gates, *switches])

    def build(self) -> Case:
        g = torch.Generator().manual_seed(0)
        tokens = (BATCH, HEADS, self.length)
        for name in ("q", "k", "v", "d_y"):
            self.x[name] = 0.7 * torch.randn(*tokens, self.d, generator=g, dtype=torch.float64)
        for name, high in (("alpha", 0.1), ("eta", 0.8), ("theta", 0.1)):
            gate = high * torch.rand(tokens, generator=g, dtype=torch.float64)
            pick = torch.rand(tokens, generator=g)
            if self.gates == "extreme":
                gate[pick < 0.1], gate[pick > 0.9] = 0.0, 0.1 if name == "theta" else 1.0
            elif self.gates != "random":  # all at one value
                gate.fill_(0.0 if self.gates == "zero" else 0.1 if name == "theta" else 1.0)
            self.x[name] = gate
        for name in ("w", "s", "dw", "ds", "d_w", "d_s"):
            self.x[name] = 0.5 * torch.randn(BATCH, HEADS, self.d, self.d, generator=g, dtype=torch.float64)
        starts = torch.zeros(BATCH, self.length, dtype=torch.bool)
        starts[0, 0] = True  # at the first token; row 2 has no start
        border = (self.length - 1) // self.chunk * self.chunk
        starts[1, border] = starts[1, border // self.chunk // 2 * self.chunk] = True
        self.x["starts"] = starts
        return self

    def state(self, w: str, s: str) -> MemoryState:
        return MemoryState((self.x[w],), (self.x[s],) if self.momentum else ())

    def rows(self, w: str, s: str) -> tuple[list[Tensor], list[Tensor]]:
        """The same, as the affine form has it."""
        return [self.x[w].flatten(0, 1)], [self.x[s].flatten(0, 1)] if self.momentum else []

    def scan(self, w: Tensor, s: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, state = self.x, MemoryState((w,), (s,) if self.momentum else ())
        y, state = memory_scan(
            x["q"], x["k"], x["v"], x["alpha"] if self.forgetting else None, x["eta"] if self.momentum else None,
            x["theta"], state, chunk_size=self.chunk,
            document_starts=x["starts"] if self.documents else None,
            document_state=self.state("dw", "ds") if self.documents else None,
        )  # fmt: skip
        return y, [*state.weights, *state.momentum]

    def sequence(self, start: int = 0, stop: int | None = None) -> Sequence:
        def cut(name: str) -> Tensor:
            return self.x[name][:, :, start:stop].flatten(0, 1)

        keep = 1 - cut("alpha") if self.forgetting else torch.ones_like(cut("theta"))
        starts = self.x["starts"][:, start:stop].repeat_interleave(HEADS, dim=0) if self.documents else None
        document = self.rows("dw", "ds") if self.documents else ([], [])  # and no base
        return Sequence(
            cut("q"), cut("k"), cut("v"), keep, cut("eta") if self.momentum else None, cut("theta"),
            ACTIVATIONS["silu"], None, starts, *document, [],
        )  # fmt: skip

    def grid(self, seq: Sequence) -> list[Segment]:
        return chunk_grid(seq.k.shape[1], self.chunk, 0, self.store_every)

    def map(self, seq: Sequence) -> Affine:
        return shard_map(seq, self.grid(seq))

    def adjoint(self, seq: Sequence, d_y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return start_adjoint(seq, d_y, self.grid(seq))

    def d_y(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.x["d_y"][:, :, start:stop].flatten(0, 1)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        b = b.reshape(a.shape)
        assert torch.isfinite(a).all() and torch.isfinite(b).all()
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1.0))
        assert error <= TOLERANCE, f"{error:.1e}"


def joined(parts: tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
    return [*parts[0], *parts[1]]


def chain(first: Affine, then: Affine) -> Affine:
    """`then` after `first`."""
    return Affine(torch.bmm(then.T, first.T), torch.baddbmm(then.U, then.T, first.U))


def back(step: Affine, d_w: list[Tensor], d_s: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """T^T [dW; dS]: the adjoint of the state before, from that of the state after."""
    parts = torch.bmm(step.T.mT, torch.cat([*d_w, *d_s], dim=1)).split(step.U.shape[2], dim=1)
    return list(parts[:1]), list(parts[1:])


SIZES = [(37, 8), (16, 8), (8, 8), (5, 8), (1, 8), (7, 1), (1, 1), (33, 16)]
SWITCHES = [(True, True), (True, False), (False, True), (False, False)]
CASES = [Case(length=length, chunk=chunk, momentum=m) for length, chunk in SIZES for m in (True, False)]
CASES += [Case(momentum=m, forgetting=f, gates=g) for m, f in SWITCHES for g in ("extreme", "zero", "one")]
CASES += [
    Case(length=length, chunk=chunk, momentum=m, forgetting=f, documents=True)
    for length, chunk in SIZES
    for m, f in SWITCHES
]
CASES += [Case(gates="extreme", documents=True, d=1), Case(length=70, chunk=16, d=16, documents=True)]

every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_the_map_gives_the_state_after_the_shard(case: Case) -> None:
    case.build()
    seq = case.sequence()
    seq = replace(seq, q=torch.full_like(seq.q, torch.nan))  # not read
    _, want = case.scan(case.x["w"], case.x["s"])
    before = [x.clone() for x in joined(case.rows("w", "s"))]
    assert_same(joined(case.map(seq).apply(*case.rows("w", "s"))), want)
    assert all(torch.equal(a, b) for a, b in zip(before, joined(case.rows("w", "s")), strict=True))


@every_case
def test_adjoints_equal_autograds_gradient_of_the_start_state(case: Case) -> None:
    case.build()
    start = [case.x["w"].requires_grad_(), *([case.x["s"].requires_grad_()] if case.momentum else [])]
    y, end = case.scan(case.x["w"], case.x["s"])
    reads = (y * case.x["d_y"]).sum()
    want = torch.autograd.grad(reads, start, retain_graph=True)
    seq = case.sequence()
    seq = replace(seq, v=torch.full_like(seq.v, torch.nan))  # not read
    got = joined(case.adjoint(seq, case.d_y()))
    assert_same(got, list(want))

    d_end = [case.x["d_w"], *([case.x["d_s"]] if case.momentum else [])]
    loss = reads + sum((a * b).sum() for a, b in zip(end, d_end, strict=True))
    through = joined(back(case.map(case.sequence()), *case.rows("d_w", "d_s")))
    assert_same([a + b for a, b in zip(got, through, strict=True)], list(torch.autograd.grad(loss, start)))


@pytest.mark.parametrize(
    "cuts", [(8,), (32,), (8, 24), (8, 16, 32)], ids=lambda cuts: "-".join(["L37-b8-cut", *map(str, cuts)])
)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])
def test_shards_in_turn_equal_the_whole(cuts: tuple[int, ...], documents: bool, momentum: bool) -> None:
    case = Case(momentum=momentum, documents=documents).build()
    spans = list(pairwise([0, *cuts, case.length]))
    maps = [case.map(case.sequence(*span)) for span in spans]
    whole = case.map(case.sequence())
    chained = reduce(chain, maps)
    assert_same([chained.T, chained.U], [whole.T, whole.U])
    _, end = case.scan(case.x["w"], case.x["s"])
    assert_same(joined(chained.apply(*case.rows("w", "s"))), end)

    adjoint = case.rows("d_w", "d_s")
    want = [a + b for a, b in zip(
        joined(back(whole, *adjoint)), joined(case.adjoint(case.sequence(), case.d_y())), strict=True
    )]  # fmt: skip
    for span, shard in reversed(list(zip(spans, maps, strict=True))):
        inside = case.adjoint(case.sequence(*span), case.d_y(*span))
        through = back(shard, *adjoint)
        weights, momenta = ([a + b for a, b in zip(*pair, strict=True)] for pair in zip(inside, through, strict=True))
        adjoint = weights, momenta
    assert_same(joined(adjoint), want)


def test_rows_of_a_document_forget_what_came_before() -> None:
    case = Case(documents=True).build()
    rows = torch.split(case.map(case.sequence()).T, HEADS)
    assert [bool(T.any()) for T in rows] == [False, False, True]


@pytest.mark.parametrize("store_every", [1, 3, 100], ids="every{}".format)
def test_how_many_chunks_share_coefficients_changes_nothing(store_every: int) -> None:
    case = Case(documents=True).build()
    other, seq = replace(case, store_every=store_every), case.sequence()
    assert torch.equal(case.map(seq).flat(), other.map(seq).flat())
    adjoints = [joined(c.adjoint(seq, c.d_y())) for c in (case, other)]
    assert all(torch.equal(a, b) for a, b in zip(*adjoints, strict=True))


@pytest.mark.parametrize("momentum,squares", [(True, 6), (False, 2)], ids=["momentum", "plain"])
def test_a_map_survives_being_one_tensor(momentum: bool, squares: int) -> None:
    case = Case(momentum=momentum).build()
    affine = case.map(case.sequence())
    flat = affine.flat()
    back = Affine.from_flat(flat.clone())
    assert flat.numel() == BATCH * HEADS * squares * case.d**2
    assert torch.equal(back.T, affine.T) and torch.equal(back.U, affine.U)


def added_products(_: object, a: list[int], b: list[int], **options: object) -> int:
    """FLOPs of baddbmm_; torch counts only baddbmm, out of place."""
    return 2 * a[0] * a[1] * a[2] * b[2]


@pytest.mark.parametrize("d,chunk", [(4, 8), (16, 8)], ids=["d4-b8", "d16-b8"])
@pytest.mark.parametrize("momentum", [True, False], ids=["momentum", "plain"])
def test_products_are_those_of_the_docstrings(d: int, chunk: int, momentum: bool) -> None:
    case = Case(length=4 * chunk, chunk=chunk, d=d, momentum=momentum).build()
    seq, tokens = case.sequence(), BATCH * HEADS * 4 * chunk
    in_place = {torch.ops.aten.baddbmm_: added_products}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        case.map(seq)
    assert counter.get_total_flops() == tokens * (18 if momentum else 8) * d**2
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        case.adjoint(seq, case.d_y())
    assert counter.get_total_flops() == tokens * ((10 if momentum else 6) * d**2 + 4 * chunk * d)


def test_a_norm_inside_is_refused() -> None:
    case = Case().build()
    seq = replace(case.sequence(), norm=Norm(torch.ones(1, 1, case.d), torch.zeros(1, 1, case.d)))
    with pytest.raises(ValueError, match="not linear"):
        case.map(seq)
    with pytest.raises(ValueError, match="not linear"):
        case.adjoint(seq, case.d_y())
