"""The memory over a whole sequence: its public form, and its autograd Function (rows.py has the work)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.activation import ACTIVATIONS
from titans_train.memory.chunk import Norm
from titans_train.memory.kernels import Chosen, choose
from titans_train.memory.recurrence import memory_mlp
from titans_train.memory.rows import RowGradients, Rows, RowsBackward, State, forward_rows
from titans_train.memory.state import MemoryState, Weights
from titans_train.memory.walk import Segment, Sequence, chunk_grid

memory_read = memory_mlp  # reading alone, M_W(q): nothing is written


@dataclass(frozen=True)
class Spec:
    """Everything about one call that carries no gradient."""

    grid: list[Segment]
    activation: str
    depth: int
    has_momentum: bool
    entered: bool  # the first chunk was begun by an earlier call
    ends_inside: bool  # the last chunk is not full
    starts: Tensor | None  # [batch, L] bool
    has_base: bool
    surprises: list[Tensor] | None
    kernels: Chosen | None  # who does whole chunks; None: plain PyTorch

    def layers(self) -> list[int]:
        """Lengths of the lists in the Function's state arguments: W, S, anchor, document W, document S, base."""
        momentum = self.depth if self.has_momentum else 0
        documents = self.starts is not None
        of_documents = [self.depth * documents, momentum * documents]
        return [self.depth, momentum, self.depth * self.entered, *of_documents, self.depth * self.has_base]

    @property
    def inputs(self) -> int:
        """The Function's tensors: q, k, v, alpha, eta, theta, gain, bias, and the states."""
        return 8 + sum(self.layers())


def _split(items: list[Tensor], sizes: list[int]) -> list[list[Tensor]]:
    iterator = iter(items)
    return [[next(iterator) for _ in range(size)] for size in sizes]


@dataclass(frozen=True)
class Call:
    """One call on flattened rows, from the Function's tensors; and the way back."""

    spec: Spec
    tensors: tuple[Tensor | None, ...]

    @property
    def shape(self) -> torch.Size:
        """batch, heads"""
        q = self.tensors[0]
        assert q is not None
        return q.shape[:2]

    def rows(self) -> Rows:
        q, k, v, alpha, eta, theta, gain, bias, *states = self.tensors
        assert q is not None and k is not None and v is not None and theta is not None
        spec, (batch, heads) = self.spec, self.shape
        norm = None
        if gain is not None and bias is not None:
            norm = Norm(gain.repeat(batch, 1)[:, None], bias.repeat(batch, 1)[:, None])
        weights, momentum, anchor, w, s, base = _split([_flat(s) for s in states if s is not None], spec.layers())
        starts = None if spec.starts is None else spec.starts.repeat_interleave(heads, dim=0)
        keep = torch.ones_like(_flat(theta)) if alpha is None else 1 - _flat(alpha)
        eta = None if eta is None else _flat(eta)
        act = ACTIVATIONS[spec.activation]
        seq = Sequence(
            _flat(q), _flat(k), _flat(v), keep, eta, _flat(theta), act, norm, starts, w, s, base, spec.kernels
        )
        return Rows(seq, weights, momentum, anchor)

    def outputs(self, y: Tensor, state: State) -> tuple[Tensor, ...]:
        """y and the state after the last token, by batch and heads."""
        weights, momentum, anchor = state
        ends = anchor if self.spec.ends_inside else []
        return tuple(x.unflatten(0, self.shape) for x in (y, *weights, *momentum, *ends))

    def output_gradient(self, rows: Rows, d_y: Tensor | None) -> Tensor:
        """[n, L, d]; None: zeros."""
        return torch.zeros_like(rows.seq.v) if d_y is None else _flat(d_y)

    def end_gradients(self, rows: Rows, d_final: tuple[Tensor | None, ...], part: slice = slice(None)) -> State:
        """Of the state after the last token, on `rows`, which are `part` of the call's; owned. None: zeros."""
        depth, momentum = self.spec.layers()[:2]
        like = [*rows.weights, *rows.momentum, *(rows.weights if self.spec.ends_inside else [])]
        own = [
            torch.zeros_like(t) if d is None else _flat(d)[part].clone(memory_format=torch.contiguous_format)
            for t, d in zip(like, d_final, strict=True)
        ]
        return own[:depth], own[depth : depth + momentum], own[depth + momentum :]

    def gradients(self, of: RowGradients) -> list[Tensor | None]:
        """Of the Function's tensors, in their order."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, self.shape)

        d_q, d_k, d_v, d_keep, d_eta, d_theta = of.tokens
        assert d_keep is not None
        d_alpha = None if self.tensors[3] is None else -d_keep
        norm = [None if g is None else g.view(*self.shape, -1).sum(0) for g in of.norm]
        states = [*of.weights, *of.momentum, *of.anchor, *of.document, *of.base]
        return [*map(rows, [d_q, d_k, d_v, d_alpha, d_eta, d_theta]), *norm, *map(rows, states)]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1).contiguous()


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call = Call(spec, tensors)
        rows = call.rows()
        y = torch.empty_like(rows.seq.v)
        state, stored = forward_rows(rows, spec.grid, y, spec.surprises)
        # The first segment's state is an input; it is kept in its flat form, for one reading path.
        ctx.spec = spec
        ctx.save_for_backward(*tensors, *stored)
        return call.outputs(y, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no second time
        call, stored = Call(spec, saved[: spec.inputs]), list(saved[spec.inputs :])
        rows = call.rows()
        end = partial(call.end_gradients, rows, d_final)
        back = RowsBackward(rows, spec.grid, stored, call.output_gradient(rows, d_y), end)
        return (None, *call.gradients(back.gradients()))


Run = Callable[..., tuple[Tensor, ...]]  # (Spec, *tensors) -> y, weights, momentum and anchor after the last token


def memory_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    state: MemoryState,
    *,
    chunk_size: int,
    activation: str = "silu",
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    document_starts: Tensor | None = None,
    document_state: MemoryState | None = None,
    base: Weights | None = None,
    store_every: int = 16,
    surprises: list[Tensor] | None = None,
    kernels: str = "plain",
    run: Run = _Scan.apply,
) -> tuple[Tensor, MemoryState]:
    """Writes every token into the memory and reads it back (Titans paper, eq. 8-15; dual form per chunk).

    q, k, v: [batch, heads, length, d]. alpha (forgetting), eta (momentum), theta (step size):
    [batch, heads, length], the first two in [0, 1]; alpha None means no forgetting, eta None no momentum.
    state: weights and momentum before the first token, batch as q or 1; inside a chunk it carries its anchor.
    gain, bias: [heads, d]; given, the memory is M(k) = k + gain * LayerNorm(MLP(k)) + bias.
    document_starts: [batch, length] bool, true only where a chunk begins; there the row takes `document_state`.
    base: weights, batch 1, that forgetting leads to; None: to zero, as in the paper.
    store_every: the backward keeps the state of every k-th chunk; changes speed and memory, not results.
    surprises: a list that receives [rows, tokens] norms of the inner gradients, by chunks and groups of rows.
    kernels: who does whole chunks, which has no base: plain (PyTorch), compiled, triton, or auto (kernels/choose).
    run: another way to scan (over parts of a sequence on several devices).

    Returns y [batch, heads, length, d] in q's dtype, and the state after the last token. Arithmetic and
    states are float32, or float64 for float64 inputs. Errors: ValueError for shapes that do not fit.
    """
    _check(q, k, v, {"alpha": alpha, "eta": eta, "theta": theta}, {"gain": gain, "bias": bias})
    _check_states(q, eta, state, chunk_size, document_starts, document_state)
    batch, length = q.shape[0], q.shape[2]
    if length == 0:
        return v.clone(), state
    offset = (state.offset + length) % chunk_size
    base = None if alpha is None else base
    # The Function's weights are what stands above the base: all the formulas are the same for that
    state, document_state = above(state, base, -1), document_state and above(document_state, base, -1)
    spec = Spec(
        chunk_grid(length, chunk_size, state.offset, store_every), activation, len(state.weights), eta is not None,
        state.offset > 0, offset > 0, document_starts, base is not None, surprises, choose(kernels, q.device, q.dtype),
    )  # fmt: skip
    tensors: list[Tensor | None] = [q, k, v, alpha, eta, theta, gain, bias]
    for source in (state, document_state if document_starts is not None else None):
        if source is not None:
            source = source.expand(batch)
            tensors += [*source.weights, *(source.momentum if eta is not None else ())]
            tensors += source.anchor or ()
    tensors += [w.expand(batch, *w.shape[1:]) for w in base or ()]
    dtype = torch.promote_types(torch.promote_types(q.dtype, torch.float32), state.weights[0].dtype)
    outputs = run(spec, *(None if t is None else t.to(dtype) for t in tensors))
    weights, momentum, anchor = _split(
        list(outputs[1:]), [spec.depth, spec.depth * (eta is not None), spec.depth * (offset > 0)]
    )
    after = MemoryState(tuple(weights), tuple(momentum), tuple(anchor) or None, offset)
    return outputs[0].to(q.dtype), above(after, base, 1)


def above(state: MemoryState, base: Weights | None, sign: int) -> MemoryState:
    """The state with the base added to its weights or taken from them."""
    if base is None:
        return state
    weights = tuple(w + sign * b.to(w.dtype) for w, b in zip(state.weights, base, strict=True))
    return replace(state, weights=weights)


def _check(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor | None], norm: dict[str, Tensor | None]) -> None:
    given = {name: tuple(gate.shape) for name, gate in gates.items() if gate is not None}
    if not q.shape == k.shape == v.shape or any(shape != q.shape[:3] for shape in given.values()):
        raise ValueError(
            "q, k, v are [batch, heads, length, d] and gates [batch, heads, length]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}, {given}"
        )
    for name, x in norm.items():
        if x is not None and x.shape != (q.shape[1], q.shape[3]):
            raise ValueError(f"{name} is [heads, d], {(q.shape[1], q.shape[3])} here; got {tuple(x.shape)}")


def _check_layers(name: str, layers: Weights, like: Weights, q: Tensor) -> None:
    """layers: [batch or 1, heads, d_in, d_out] each, as those of `like`."""
    batch, heads, _, d = q.shape
    widths = [d, *(w.shape[-1] for w in like)]
    for x, a, b in zip(layers, widths, widths[1:], strict=False):
        if x.dim() != 4 or x.shape[0] not in (1, batch) or x.shape[1:] != (heads, a, b):
            shapes = [tuple(x.shape) for x in layers]
            raise ValueError(
                f"{name} is [{batch} or 1, {heads}, d_in, d_out] by layer, after the one before; got {shapes}"
            )


def _check_states(
    q: Tensor, eta: Tensor | None, state: MemoryState, chunk_size: int, starts: Tensor | None,
    document_state: MemoryState | None,
) -> None:  # fmt: skip
    d = q.shape[-1]
    if state.weights[0].shape[-2] != d or state.weights[-1].shape[-1] != d:
        shapes = [tuple(w.shape) for w in state.weights]
        raise ValueError(f"the memory maps width {d} to width {d}; its weights have shapes {shapes}")
    for name, each in (("state", state), ("document_state", document_state if starts is not None else None)):
        if each is None:
            continue
        if len(each.weights) != len(state.weights) or (eta is not None and len(each.momentum) != len(state.weights)):
            raise ValueError(
                f"{name} has {len(each.weights)} layers and momentum of {len(each.momentum)}, the state "
                f"{len(state.weights)} layers{'' if eta is None else ' and, eta being given, needs momentum of each'}; "
                "start it with MemoryState.start(weights)"
            )
        _check_layers(f"the weights of {name}", each.weights, state.weights, q)
        _check_layers(f"the momentum of {name}", each.momentum if eta is not None else (), state.weights, q)
        _check_layers(f"the anchor of {name}", each.anchor or (), state.weights, q)
    if not 0 <= state.offset < chunk_size:
        raise ValueError(f"the state is {state.offset} tokens inside a chunk, but chunk_size is {chunk_size}")
    if starts is None:
        return
    if document_state is None or document_state.offset:
        raise ValueError("document_starts needs a document_state at a chunk border (offset 0)")
    if starts.device.type == "cpu":
        grid = (torch.arange(starts.shape[1]) + state.offset) % chunk_size == 0
        wrong = (starts & ~grid).nonzero()
        if len(wrong):
            raise ValueError(
                f"a document starts at token {int(wrong[0, 1])} of row {int(wrong[0, 0])}, which is not a multiple of "
                f"chunk_size {chunk_size}; pad the previous document up to a chunk border"
            )
