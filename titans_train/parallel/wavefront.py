"""The memory's scan over sequence shards as a wavefront, for any memory.

The rows (batch and heads) of a scan form pieces. Forward: for each piece, take its state from the left, scan this
shard's tokens, hand the state on to the right. Backward, from the last piece to the first: repeat the last chunks,
take the state's gradient from the right, go back through the tokens, hand the gradient on to the left. While a rank
works on a piece the next state is under way; a rank runs behind its neighbour, and nothing waits for all.

One autograd Function owns both loops, so that the order of messages is this file's, not autograd's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.rows import RowGradients, Rows, RowsBackward, State, forward_rows, join_states
from titans_train.memory.scan import Call, Spec

if TYPE_CHECKING:
    from titans_train.parallel.links import Label
    from titans_train.parallel.shards import Shards


def wave_scan(shards: Shards, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """For any memory."""
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
        gradients = _backward(ctx.shards, call, stored, d_y, d_final)
        return (None, None, *call.gradients(gradients))


def _state(rows: Rows) -> list[Tensor]:
    return [*rows.weights, *rows.momentum]


def _backward(
    shards: Shards, call: Call, stored: list[Tensor], d_y: Tensor | None, d_final: tuple[Tensor | None, ...]
) -> RowGradients:
    grid, links = call.spec.grid, shards.links
    rows = call.rows()
    flat_d_y = call.output_gradient(rows, d_y)
    parts = shards.pieces(flat_d_y.shape[0])
    pieces = [rows.part(part) for part in parts]
    each = len(stored) // len(parts)
    out: list[RowGradients] = []

    def label(number: int) -> Label:
        return shards.label("state", number, gradient=True)

    def ahead(number: int) -> None:
        if links.has("right") and number >= 0:
            links.expect("right", label(number), _state(pieces[number]))

    def end(number: int) -> State:
        """Of the state after this shard: what this rank's own graph adds, and from the right."""
        own = call.end_gradients(pieces[number], d_final, parts[number])
        if links.has("right"):
            received = links.gradient(label(number), _state(pieces[number]))
            for gradient, more in zip([*own[0], *own[1]], received, strict=True):
                gradient += more
        return own

    ahead(len(parts) - 1)
    for number in range(len(parts) - 1, -1, -1):
        ahead(number - 1)
        kept = stored[number * each : (number + 1) * each]
        gradients = RowsBackward(pieces[number], grid, kept, flat_d_y[parts[number]], partial(end, number)).gradients()
        if links.has("left"):
            links.answer(label(number), [*gradients.weights, *gradients.momentum])
            gradients.leave_start()
        out.insert(0, gradients)
    return RowGradients.join(out)
