"""What rows carry from one global batch to the next (training.carry_state): truncated backpropagation through time.

A row's state is detached at a batch's end: gradients stop there. Over sequence shards the last shard ends with the
state that the first one begins the next batch with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.state import ModelState
from titans_train.models.tree import map_tensors, tensors_of
from titans_train.parallel.launch import hand_over
from titans_train.parallel.mesh import Mesh


class CarriedStates:
    """One state for each micro-batch of a step; only the first shard has any."""

    def __init__(self, micro_batches: int, mesh: Mesh, rope_base: float) -> None:
        self.states: list[ModelState | None] = [None] * micro_batches
        self.mesh, self.rope_base = mesh, rope_base

    def before(self, number: int) -> ModelState | None:
        return self.states[number]

    def after(self, number: int, state: ModelState) -> None:
        """Collective over the shards of a sequence, after the backward."""
        state = _from_here(state.detach(), self.rope_base)
        received = hand_over(tensors_of(state), self.mesh)
        if received is not None:
            values = iter(received)
            self.states[number] = map_tensors(lambda _: next(values), state)


def _from_here(state: ModelState, base: float) -> ModelState:
    """The next batch counts its positions from 0."""

    def moved(attention: AttentionState | None) -> AttentionState | None:
        return None if attention is None else attention.from_here(base)

    blocks = [BlockState(moved(b.attention), b.memory) if isinstance(b, BlockState) else b for b in state.blocks]
    return ModelState(tuple(blocks))


def with_starts(starts: Tensor | None, continues: Tensor | None, like: Tensor) -> Tensor | None:
    """Document starts [B, L] in which a row that does not go on begins a document.

    Given `continues`, there are always starts: a state that is not used must still lead to its parameters.
    """
    if continues is None:
        return starts
    starts = torch.zeros_like(like, dtype=torch.bool) if starts is None else starts.clone()
    starts[:, 0] |= ~continues
    return starts
