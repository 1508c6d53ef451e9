"""The linear memory's scan over sequence shards as affine maps: all shards at once, one exchange in each direction.

Forward: every shard makes its own map of the state, [W; S] <- T [W; S] + U, the maps are gathered, and each shard
composes those to its left into the state that it starts from; then it scans. Backward: every shard makes what its
outputs add to the gradient of the state before it, these are gathered, and each shard composes those to its right
into the gradient of the state that it ends with; then it goes back through its tokens. Messages do not depend on the
length; the price is the map itself, more work than it would take to scan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_train.memory.affine import Affine, shard_map, start_adjoint
from titans_train.memory.rows import RowGradients, Rows, RowsBackward, State, forward_rows
from titans_train.memory.scan import Call, Spec

if TYPE_CHECKING:
    from titans_train.parallel.shards import Shards


def affine_scan(shards: Shards, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """For a memory of depth 1 without norm."""
    if spec.depth != 1 or tensors[6] is not None:
        raise ValueError("the affine scan needs a linear memory: depth 1, and no norm inside")
    return _AffineScan.apply(shards, spec, *tensors)  # type: ignore[no-any-return]


def _gather(shards: Shards, name: str, own: Tensor) -> list[Tensor]:
    return shards.links.gather(shards.label(name, 0), own)


def _start(maps: list[Tensor], shard: int, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """The state before this shard. The first shard's map has the state after it, and forgets what it is applied to."""
    state = rows.weights, rows.momentum
    for flat in maps[:shard]:
        state = Affine.from_flat(flat).apply(*state)
    return state


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shards: Shards, spec: Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        call, shard = Call(spec, tensors), shards.links.shard
        rows = call.rows()

        def exchange() -> list[Tensor]:
            own = shard_map(rows.seq, spec.grid)
            if shard == 0:  # the others need the state that it ends with, and know no start
                after = own.apply(rows.weights, rows.momentum)
                own = Affine(torch.zeros_like(own.T), torch.cat([*after[0], *after[1]], dim=1))
            return _gather(shards, "map", own.flat())

        maps = shards.once(exchange)
        rows.weights, rows.momentum = _start(maps, shard, rows)
        y = torch.empty_like(rows.seq.v)
        state, stored = forward_rows(rows, spec.grid, y, spec.surprises)
        ctx.spec, ctx.shards = spec, shards
        later = torch.stack(maps[shard:])[:, :, :, : maps[0].shape[1]]  # T of this shard and those to its right
        ctx.save_for_backward(*tensors, *stored, later)
        ctx.set_materialize_grads(False)
        return call.outputs(y, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, *d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        spec, shards = ctx.spec, ctx.shards
        saved = ctx.saved_tensors
        call, later = Call(spec, saved[: spec.inputs]), saved[-1]
        rows, stored = call.rows(), list(saved[spec.inputs : -1])
        flat_d_y, end = call.output_gradient(rows, d_y), call.end_gradients(rows, d_final)

        def back(end: State) -> RowGradients:
            return RowsBackward(rows, spec.grid, stored, flat_d_y, lambda: end).gradients()

        if spec.ends_inside:  # the last shard: nothing is added to its end, and its anchor is no part of the map
            gradients = back(end)
            _gather(shards, "adjoint", torch.cat([*gradients.weights, *gradients.momentum], dim=1))
        else:
            gradients = back(_end_adjoint(shards, rows, spec, flat_d_y, end, later))
        if shards.links.has("left"):
            gradients.leave_start()
        return (None, None, *call.gradients(gradients))


def _end_adjoint(shards: Shards, rows: Rows, spec: Spec, d_y: Tensor, end: State, later: Tensor) -> State:
    """The gradient of the state after this shard: its own, and what the shards to the right add."""
    weights, momentum, anchor = end
    shard = shards.links.shard
    added = torch.cat([*weights, *momentum], dim=1)
    if shard:  # nobody asks the first shard
        through = torch.cat(sum(start_adjoint(rows.seq, d_y, spec.grid), []), dim=1)
        added = torch.baddbmm(through, later[0].mT, added)
    gathered = _gather(shards, "adjoint", added)
    total = torch.zeros_like(added)
    for n in range(len(gathered) - 1, shard, -1):
        total = torch.baddbmm(gathered[n], later[n - shard].mT, total)
    parts = list(total.split(weights[0].shape[1], dim=1))
    return [weights[0] + parts[0]], [m + part for m, part in zip(momentum, parts[1:], strict=True)], anchor
