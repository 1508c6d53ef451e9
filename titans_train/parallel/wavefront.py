"""The memory's scan over sequence shards as a wavefront, for any memory.

The rows (batch and heads) of a scan form pieces. Forward: for each piece, take its state from the left, scan this
shard's tokens, hand the state on to the right. Backward, from the last piece to the first: repeat the last chunks,
take the state's gradient from the right, go back through the tokens, hand the gradient on to the left. While a rank
works on a piece the next state is under way; a rank runs behind its neighbour, and nothing waits for all.

One autograd Function owns both loops, so that the order of messages is this file's, not autograd's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.rows import RowGradients, Rows, RowsBackward, State, forward_rows, join_states
from titans_train.memory.scan import Call, Spec

if TYPE_CHECKING:
    from titans_train.parallel.shards import Shards


def wave_scan(shards: Shards, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """memory.scan's `run`. ValueError: a shard that ends inside a chunk, unless it is the last."""
    if spec.entered or (spec.ends_inside and shards.links.has("right")):
        raise ValueError("a shard of a sequence begins and ends at a chunk border; only the last one may end inside")
    return _Wave.apply(shards, spec, *tensors)  # type: ignore[no-any-return]


class _Wave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call = Call(spec, tensors)
        rows = call.rows()
        y, ends, stored = torch.empty_like(rows.seq.v), [], []
        parts = shards.pieces(y.shape[0])
        pieces = [rows.part(part) for part in parts]
        shards.ahead("state", _state(pieces[0]), 0)
        for number, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
            if number + 1 < len(pieces):
                shards.ahead("state", _state(pieces[number + 1]), number + 1)
            begin = list(shards.incoming("state", _state(piece), number))
            piece.weights, piece.momentum = begin[: spec.depth], begin[spec.depth :]
            end, kept = forward_rows(piece, spec.grid, y[part], spec.surprises)
            shards.outgoing("state", [*end[0], *end[1]], number)
            ends.append(end)
            stored += kept
        ctx.spec, ctx.shards = spec, shards
        ctx.save_for_backward(*tensors, *stored)
        ctx.set_materialize_grads(False)
        return call.outputs(y, join_states(ends))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: Spec = ctx.spec
        saved = ctx.saved_tensors
        call, stored = Call(spec, saved[: spec.inputs]), list(saved[spec.inputs :])
        gradients = _backward(ctx.shards, call, stored, d_y, list(d_final))
        return (None, None, *call.gradients(gradients))


def _state(rows: Rows) -> list[Tensor]:
    return [*rows.weights, *rows.momentum]


def _backward(
    shards: Shards, call: Call, stored: list[Tensor], d_y: Tensor | None, d_final: list[Tensor | None]
) -> RowGradients:
    spec, links = call.spec, shards.links
    rows = call.rows()
    flat_d_y = torch.zeros_like(rows.seq.v) if d_y is None else d_y.flatten(0, 1).contiguous()
    d_ends = [None if d is None else d.flatten(0, 1) for d in d_final]
    parts = shards.pieces(flat_d_y.shape[0])
    pieces = [rows.part(part) for part in parts]
    each = len(stored) // len(parts)
    out: list[RowGradients] = []

    def ahead(number: int) -> None:
        if links.has("right") and number >= 0:
            links.expect("right", shards.label("state", number, gradient=True), _state(pieces[number]))

    ahead(len(parts) - 1)
    for number in range(len(parts) - 1, -1, -1):
        ahead(number - 1)

        def end(number: int = number) -> State:
            own = [None if d is None else d[parts[number]] for d in d_ends]
            return _end_gradients(shards, spec, number, pieces[number], own)

        kept = stored[number * each : (number + 1) * each]
        gradients = RowsBackward(pieces[number], spec.grid, kept, flat_d_y[parts[number]], end).gradients()
        if links.has("left"):
            links.answer(shards.label("state", number, gradient=True), [*gradients.weights, *gradients.momentum])
            for gradient in (*gradients.weights, *gradients.momentum):
                gradient.zero_()  # the start belongs to the first shard
        out.insert(0, gradients)
    return RowGradients.join(out)


def _end_gradients(shards: Shards, spec: Spec, number: int, piece: Rows, own: list[Tensor | None]) -> State:
    """Of the state after this shard: from the right, and what this rank's own graph adds."""
    depth, momentum = spec.layers()[:2]
    count, links = depth + momentum, shards.links
    if links.has("right"):
        found = links.gradient(shards.label("state", number, gradient=True), _state(piece))
    else:
        found = [torch.zeros_like(t) for t in _state(piece)]
    for gradient, more in zip(found, own, strict=False):
        if more is not None:
            gradient += more
    anchor = [torch.zeros_like(w) if d is None else d.clone() for w, d in zip(piece.weights, own[count:], strict=False)]
    return found[:depth], found[depth:count], anchor
