"""One optimiser step over the whole global batch.

The loss is the mean over the valid tokens of the global batch, all ranks and micro-batches together, however they
are spread. Forwards and the backward stay apart: a wave of micro-batches is forwarded, then one backward of the
summed loss; a wave is one micro-batch for now.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.data import Batch
from titans_train.data.sample import IGNORE
from titans_train.parallel import Engine, Mesh, sum_over_data
from titans_train.parallel.launch import device


@dataclass(frozen=True)
class StepResult:
    loss_sum: Tensor  # [2] float64 on the device, over the global batch: sum of token losses, number of valid tokens

    def loss(self) -> float:
        """Mean over valid tokens. Waits for the device."""
        total, valid = self.loss_sum.tolist()
        return total / max(valid, 1)


def to_device(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    where = device()
    starts = None if batch.document_starts is None else batch.document_starts.to(where, non_blocking=True)
    return batch.tokens.to(where, non_blocking=True), batch.labels.to(where, non_blocking=True), starts


def valid_tokens(batches: list[Batch], mesh: Mesh) -> Tensor:
    """Of the global batch: a 0-d float64 tensor on the device."""
    count = sum(int((b.labels != IGNORE).sum()) for b in batches)
    return sum_over_data(torch.tensor(float(count), dtype=torch.float64, device=device()), mesh)


def train_step(
    engine: Engine, batches: list[Batch], learning_rate: float, before_update: Callable[[], None] | None = None
) -> StepResult:
    """Forward, backward and update for this rank's micro-batches of one step.

    before_update: called when the whole gradient is there, before clipping (parity checks read it).
    """
    valid = valid_tokens(batches, engine.mesh)
    scale = (engine.loss_scale() / valid.clamp_min(1)).float()
    total = torch.zeros((), dtype=torch.float64, device=device())
    waves = [[batch] for batch in batches]
    for wave in waves:
        losses = [forward(engine, batch) for batch in wave]
        loss_sum = torch.stack(losses).sum()
        engine.backward(loss_sum * scale)
        if wave is waves[-1] and before_update is not None:
            before_update()
        engine.step(learning_rate)
        total += loss_sum.detach()
    return StepResult(torch.stack([sum_over_data(total, engine.mesh), valid]))


def forward(engine: Engine, batch: Batch) -> Tensor:
    """Sum of the token losses of one micro-batch."""
    tokens, labels, starts = to_device(batch)
    loss = engine(tokens, labels=labels, document_starts=starts).loss_sum
    assert isinstance(loss, Tensor)
    return loss
