"""models/parts.py for tensor-parallel ranks. (megatron_layers.py has the layers.)

With sequence parallelism a parameter that all ranks share (norms of the residual stream, persistent tokens) has a
partial gradient on each: a hook sums it as backward makes it, before ZeRO sees it. Without, it is complete everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_train.models.parts import Parts, SingleDevice
from titans_train.parallel.groups import tensor_group
from titans_train.parallel.links import Links
from titans_train.parallel.mesh import Mesh
from titans_train.parallel.shards import Shards, ShardSettings
from titans_train.parallel.split import Split, cut_parameter

if TYPE_CHECKING:
    from titans_train.models.neighbours import Neighbours
    from titans_train.models.parts import Sections


def make_parts(mesh: Mesh, sequence_parallel: bool, shards: ShardSettings | None = None) -> Parts:
    """The building blocks of a model on this mesh; `shards`: given where mesh.sequence > 1."""
    whole = SingleDevice() if shards is None else SequenceShards(mesh, shards)
    return whole if mesh.tensor == 1 else TensorParallel(mesh, sequence_parallel, whole)


class SequenceShards(SingleDevice):
    """Whole layers on a shard of each sequence."""

    def __init__(self, mesh: Mesh, settings: ShardSettings) -> None:
        self.links, self.settings = Links(mesh), settings
        self.layers: list[Shards] = []

    def neighbours(self, layer: int) -> Neighbours:
        self.layers.append(Shards(self.links, layer, self.settings))
        return self.layers[-1]

    @contextmanager
    def sequences_of(self, length: int) -> Iterator[None]:
        before = self.settings
        if length % self.links.shards:
            raise ValueError(f"{length} tokens cannot be cut into {self.links.shards} equal shards")
        self._set(replace(before, length=length // self.links.shards))
        try:
            yield
        finally:
            self._set(before)

    def _set(self, settings: ShardSettings) -> None:
        self.settings = settings
        for shards in self.layers:
            shards.set(settings)

    def shard(self, x: Tensor) -> Tensor:
        first = self.links.shard * self.settings.length
        return x[:, first : first + self.settings.length]

    def finish(self) -> None:
        self.links.finish()


class TensorParallel:
    """Shares of layers; what concerns the sequence is as `along` has it."""

    def __init__(self, mesh: Mesh, sequence_parallel: bool, along: SingleDevice) -> None:
        from titans_train.parallel import megatron_layers

        self.neighbours, self.shard, self.finish = along.neighbours, along.shard, along.finish
        self.sequences_of = along.sequences_of
        self.layers = megatron_layers
        self.size, self.rank = mesh.tensor, mesh.tensor_rank
        self.options: dict[str, Any] = {"ranks": tensor_group(mesh), "sequence_parallel": sequence_parallel}

    def share(self, count: int) -> int:
        return count // self.size

    def cut(self, whole: Tensor, dim: int, sections: Sequence[int] = ()) -> nn.Parameter:
        return cut_parameter(whole, Split(dim, self.size, tuple(sections)), self.rank)

    def parameter(self, value: Tensor, dim: int | None) -> nn.Parameter:
        if dim is not None:
            return self.cut(value, dim)
        shared = nn.Parameter(value)
        if self.options["sequence_parallel"]:
            shared.register_hook(self._complete)
        return shared

    def _complete(self, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=self.options["ranks"])
        return gradient

    def columns(self, inputs: int, sections: Sections, std: float) -> nn.Module:
        whole = torch.randn(sum(sections.values()), inputs) * std
        shares = {name: width // self.size for name, width in sections.items()}
        return self.layers.Columns(self.cut(whole, 0, list(sections.values())), shares, **self.options)

    def rows(self, inputs: int, outputs: int, std: float) -> nn.Module:
        return self.layers.Rows(self.cut(torch.randn(outputs, inputs) * std, 1), **self.options)

    def table(self, vocabulary: int, padded: int, width: int, std: float) -> nn.Module:
        return self.layers.Table(self.cut(torch.randn(padded, width) * std, 0), vocabulary, **self.options)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.layers.losses_of(logits, labels, self.options["ranks"]).sum()

    def token_scores(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.layers.token_scores(logits, labels, self.options["ranks"])
