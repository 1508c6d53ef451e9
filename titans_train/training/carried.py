"""What rows carry from one global batch to the next (training.carry_state): truncated backpropagation through time.

A row's state is detached at a batch's end: gradients stop there. Over sequence shards the last shard ends with the
state that the first one begins the next batch with; only ranks with a first shard hold any.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.state import ModelState
from titans_train.models.tree import join_rows, map_tensors, take_rows, tensors_of
from titans_train.parallel.launch import device
from titans_train.parallel.links import hand_over
from titans_train.parallel.mesh import Mesh
from titans_train.parallel.split import cut_heads, join_heads
from titans_train.plan import Plan


class CarriedStates:
    """One state for each micro-batch of a step; None before the first step, and on ranks with other shards."""

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        self.plan, self.mesh = plan, mesh
        self.states: list[ModelState | None] = [None] * plan.accumulation

    @property
    def rows(self) -> int:
        """Of the global batch, on this rank; they begin at data_rank * rows."""
        return self.plan.accumulation * self.plan.config.training.micro_batch_size

    def before(self, number: int) -> ModelState | None:
        """For micro-batch `number` of a step."""
        return self.states[number]

    def after(self, number: int, state: ModelState) -> None:
        """Takes what micro-batch `number` has ended with. Collective over the shards of a sequence."""
        state = _from_here(state.detach(), self.plan.shape.attention.rope_base)
        received = hand_over(tensors_of(state), self.mesh)
        if received is not None:
            values = iter(received)
            self.states[number] = map_tensors(lambda _: next(values), state)

    def kept(self) -> list[ModelState | None]:
        """What `put_back` takes, when a step is not to count."""
        return list(self.states)

    def put_back(self, kept: list[ModelState | None]) -> None:
        self.states = kept

    # ---- files: one for each data rank's rows, with all heads

    def snapshot(self) -> tuple[str, ModelState] | None:
        """This rank's rows in host memory, for the file of that name; None where another rank has them or none are.

        Collective over the tensor-parallel ranks.
        """
        if self.mesh.sequence_rank or self.states[0] is None:
            return None
        whole = map_tensors(lambda t: join_heads(t, self.mesh), join_rows(list(self.states)))
        if self.mesh.tensor_rank:
            return None
        on_host = map_tensors(lambda t: t.detach().to("cpu", copy=True), whole)
        return _file_name(self.mesh.data_rank * self.rows), on_host

    def load(self, folder: Path, names: Iterable[str]) -> None:
        """Takes this rank's rows from files that any layout has written. ValueError unless they hold every row once."""
        if self.mesh.sequence_rank:
            return
        first, found, start = self.mesh.data_rank * self.rows, [], 0
        for name in sorted(names):
            state = ModelState.load(folder / name, self.plan.shape)
            count = len(tensors_of(state)[0])
            if name != _file_name(start):
                raise ValueError(f"{folder / name} does not begin with row {start}, where the one before it ends")
            wanted = slice(max(first - start, 0), min(first + self.rows - start, count))
            if wanted.start < wanted.stop:
                found.append(take_rows(state, wanted))
            start += count
        if found:
            if start != (rows := self.plan.config.training.global_batch_size):
                raise ValueError(f"{folder} has the states of {start} rows, the batch has {rows}")
            own = map_tensors(lambda t: cut_heads(t, self.mesh).to(device()), join_rows(found))
            size = self.plan.config.training.micro_batch_size
            self.states = [take_rows(own, slice(i, i + size)) for i in range(0, self.rows, size)]


def _file_name(first_row: int) -> str:
    return f"carried-{first_row:08d}.safetensors"


def _from_here(state: ModelState, base: float) -> ModelState:
    """The next batch counts its positions from 0."""

    def moved(attention: AttentionState | None) -> AttentionState | None:
        return None if attention is None else attention.from_here(base)

    blocks = [BlockState(moved(b.attention), b.memory) if isinstance(b, BlockState) else b for b in state.blocks]
    return ModelState(tuple(blocks))
