"""How a parameter is cut over the tensor-parallel ranks, and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titans_train.parallel.groups import tensor_group
from titans_train.parallel.mesh import Mesh


@dataclass(frozen=True)
class Split:
    """Cut along `dim` into `parts` equal shares; where several maps lie in one tensor, each of its sections is cut.

    sections: whole lengths along `dim`, in order; () for one section.
    """

    dim: int
    parts: int
    sections: tuple[int, ...] = ()

    def share(self, whole: Tensor, part: int) -> Tensor:
        """Part 0, 1, ... of the whole tensor, as a copy."""
        sections = self.sections or (whole.shape[self.dim],)
        for length in sections:
            if length % self.parts:
                raise ValueError(f"{length} along dimension {self.dim} cannot be cut into {self.parts} equal shares")
        own = [s.chunk(self.parts, self.dim)[part] for s in whole.split(sections, self.dim)]
        return torch.cat(own, self.dim)

    def join(self, shares: list[Tensor]) -> Tensor:
        """The whole of all shares, in order: the inverse of `share`."""
        lengths = [length // self.parts for length in self.sections] or [shares[0].shape[self.dim]]
        ends = list(accumulate(lengths))
        pieces = [
            share.narrow(self.dim, end - length, length)
            for end, length in zip(ends, lengths, strict=True)
            for share in shares
        ]
        return torch.cat(pieces, self.dim)


def cut_parameter(whole: Tensor, split: Split, part: int) -> nn.Parameter:
    """A parameter with one share. DeepSpeed and Megatron see by `tensor_model_parallel` that ranks differ in it."""
    parameter = nn.Parameter(split.share(whole, part))
    parameter.split_over_tensor_ranks = split  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def split_of(parameter: Tensor) -> Split | None:
    """None: the parameter is the same on every rank."""
    split: Split | None = getattr(parameter, "split_over_tensor_ranks", None)
    return split


def join_over_ranks(parameter: Tensor, value: Tensor, mesh: Mesh) -> Tensor:
    """The whole of a value that is split as the parameter is, on every tensor-parallel rank. Collective."""
    split = split_of(parameter)
    if split is None:
        return value
    return _join(split, value, mesh)


def _join(split: Split, own: Tensor, mesh: Mesh) -> Tensor:
    shares = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(split.parts)]
    dist.all_gather(shares, own.detach().contiguous(), group=tensor_group(mesh))
    return split.join(shares)


def _split_of_state(tensor: Tensor, mesh: Mesh) -> Split | None:
    """Of a tensor that a model carries: [B, H, ..., ...] or [B, K, H d]; [B, C] has no heads."""
    dim = {4: 1, 3: 2}.get(tensor.ndim)
    return None if dim is None or mesh.tensor == 1 else Split(dim, mesh.tensor)


def join_heads(own: Tensor, mesh: Mesh) -> Tensor:
    """All heads of a tensor of a model's state. Collective over the tensor-parallel ranks."""
    split = _split_of_state(own, mesh)
    return own if split is None else _join(split, own, mesh)


def cut_heads(whole: Tensor, mesh: Mesh) -> Tensor:
    """This rank's heads of such a tensor."""
    split = _split_of_state(whole, mesh)
    return whole if split is None else split.share(whole, mesh.tensor_rank)
