"""The process groups: megatron-core's where a model is split, else the world. And what DeepSpeed asks about them.

Relied on, and held by tests/parallel/test_contracts.py: parallel_state orders ranks tensor, then context (our sequence
shards), then data; its data-parallel group "with context parallel" is every rank that shares this rank's weights.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from titans_train.parallel.mesh import Mesh

# Messages between neighbouring shards, by direction ("rightward", "leftward").
_edges: dict[str, dist.ProcessGroup] = {}


def make_groups(mesh: Mesh, timeout: timedelta) -> None:
    """Collective. megatron-core is imported only where a model is split: it takes seconds."""
    if mesh.model == 1:
        return
    if not torch.cuda.is_available():  # megatron-core 0.16 asks for it where it makes buffers
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    state = _state()
    dist.barrier()  # importing takes each rank as long as it takes; from here on `timeout` counts
    state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor, context_parallel_size=mesh.sequence,
        distributed_timeout_minutes=timeout.total_seconds() / 60, create_gloo_process_groups=False,
    )  # fmt: skip
    if mesh.sequence > 1:
        _make_edges(mesh, timeout)


def _make_edges(mesh: Mesh, timeout: timedelta) -> None:
    """A group for each direction: in one, NCCL would let messages to the left wait for those to the right."""
    for first in range(0, mesh.world_size, mesh.model):
        for tensor_rank in range(mesh.tensor):
            shards = [first + tensor_rank + shard * mesh.tensor for shard in range(mesh.sequence)]
            for direction in ("rightward", "leftward"):
                group = dist.new_group(shards, timeout=timeout)  # every process makes every group
                if mesh.rank in shards:
                    _edges[direction] = group


def edge_group(direction: str) -> dist.ProcessGroup:
    """The shards of this rank's sequences, for messages "rightward" or "leftward" (and from the last to the first)."""
    return _edges[direction]


def leave_groups(mesh: Mesh) -> None:
    """Collective. megatron-core only forgets its groups; their threads and sockets would stay."""
    if mesh.model == 1:
        return
    state = _state()
    groups = (state._global_process_group_list or [None])[1:]  # the first stands for the world
    state.destroy_model_parallel()
    groups += list(_edges.values())
    _edges.clear()
    for group in groups:
        dist.destroy_process_group(group)


def tensor_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks that hold the shares of this rank's weights."""
    assert mesh.model > 1
    return _state().get_tensor_model_parallel_group()  # type: ignore[no-any-return]


def data_group(mesh: Mesh) -> dist.ProcessGroup:
    """The ranks with the same weights and other tokens: data-parallel ranks and sequence shards."""
    if mesh.model == 1:
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return _state().get_data_parallel_group(with_context_parallel=True)  # type: ignore[no-any-return]


def _state() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on its first import: that Transformer Engine and Apex are not installed
        from megatron.core import parallel_state

    return parallel_state


class DeepSpeedGroups:
    """The `mpu` that deepspeed.initialize takes: ZeRO shards and averages over data ranks and sequence shards."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return tensor_group(self.mesh)

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self.mesh.rank - self.mesh.tensor_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return data_group(self.mesh)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(data_group(self.mesh))

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(data_group(self.mesh))

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(data_group(self.mesh))
