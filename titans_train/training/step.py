"""One optimiser step over the whole global batch.

The loss is the mean over the valid tokens of the global batch, all ranks and micro-batches together, however they
are spread. A wave of micro-batches is forwarded, then one backward of the summed loss: over sequence shards the ranks
wait for each other once per wave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.data import Batch
from titans_train.data.sample import IGNORE
from titans_train.models.parts import Parts
from titans_train.models.state import ModelState
from titans_train.parallel import Engine, Mesh, sum_over_data
from titans_train.parallel.launch import device
from titans_train.training.carried import CarriedStates


@dataclass(frozen=True)
class StepResult:
    loss_sum: Tensor  # [2] float64 on the device, over the global batch: sum of token losses, number of valid tokens
    own_losses: Tensor  # [micro-batches] on the device: this rank's sums of token losses
    applied: bool = True  # False: loss or gradient was not finite somewhere, and nothing has changed anywhere

    def loss(self) -> float:
        """Mean over valid tokens. Waits for the device."""
        total, valid = self.loss_sum.tolist()
        return total / max(valid, 1)


def own_share(batch: Batch, parts: Parts) -> Batch:
    """This rank's shard of a batch of whole sequences; what `loader` gives is cut already."""
    starts = None if batch.document_starts is None else parts.shard(batch.document_starts)
    return Batch(parts.shard(batch.tokens), parts.shard(batch.labels), starts, batch.sample_ids)


def to_device(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    where = device()
    starts = None if batch.document_starts is None else batch.document_starts.to(where, non_blocking=True)
    return batch.tokens.to(where, non_blocking=True), batch.labels.to(where, non_blocking=True), starts


def valid_tokens(batches: list[Batch], mesh: Mesh) -> Tensor:
    """Of the global batch, from each rank's own share, counted where it was read: 0-d float64 on the device."""
    count = sum(int((b.labels != IGNORE).sum()) for b in batches)
    return sum_over_data(torch.tensor(float(count), dtype=torch.float64, device=device()), mesh)


def train_step(
    engine: Engine,
    batches: list[Batch],
    learning_rate: float,
    before_update: Callable[[], None] | None = None,
    carried: CarriedStates | None = None,
) -> StepResult:
    """Forward, backward and update for this rank's micro-batches of one step, each with its shard of the rows.

    before_update: called when the whole gradient is there, before clipping (parity checks read it).
    carried: the states that rows go on from, replaced by those that they end with, unless the step is not applied.
    """
    parts: Parts = engine.model.parts  # type: ignore[assignment]
    valid = valid_tokens(batches, engine.mesh)
    scale = (engine.loss_scale() / valid.clamp_min(1)).float()
    sums: list[Tensor] = []
    before = carried.kept() if carried else []
    length = len(batches) // engine.accumulation
    for first in range(0, len(batches), length):
        losses, states = [], []
        for number in range(first, first + length):
            loss, state = forward(engine, batches[number], carried.before(number) if carried else None, bool(carried))
            losses.append(loss)
            states.append(state)
        loss_sum = torch.stack(losses).sum()
        # A loss that is not finite may have a gradient that is: this makes it show there, where all ranks look.
        engine.backward(loss_sum * scale * torch.where(torch.isfinite(loss_sum), 1.0, torch.nan))
        parts.finish()
        if first + length == len(batches) and before_update is not None:
            before_update()
        engine.step(learning_rate)
        sums += [loss.detach() for loss in losses]
        for number, state in enumerate(states, first):
            if carried is not None and state is not None:
                carried.after(number, state)
    if carried is not None and not engine.applied:
        carried.put_back(before)
    own = torch.stack(sums)
    return StepResult(torch.stack([sum_over_data(own.double().sum(), engine.mesh), valid]), own, engine.applied)


def forward(
    engine: Engine, batch: Batch, state: ModelState | None = None, return_state: bool = False
) -> tuple[Tensor, ModelState | None]:
    """Sum of the token losses of this rank's share of a micro-batch, and what its rows end with."""
    tokens, labels, starts = to_device(batch)
    out = engine(tokens, labels=labels, document_starts=starts, state=state, return_state=return_state)
    assert isinstance(out.loss_sum, Tensor)
    return out.loss_sum, out.state
