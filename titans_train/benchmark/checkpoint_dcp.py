"""Pieces of this project as torch.distributed.checkpoint takes them: blocks of whole tensors, at their offsets.

A piece is a flat range, which is up to two broken rows and the rows between; where tensor ranks cut several sections of
a dimension, a block is cut at their borders. So what is saved on one layout can be loaded on any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from titans_train.parallel.pieces import Piece
from titans_train.parallel.split import Split

Place = tuple[int, ...]


class Blocks:
    """Blocks of one tensor, by their offsets in the whole (torch.distributed._checkpointable's protocol)."""

    def __init__(self, whole: Place, piece: Piece, flat: Tensor) -> None:
        """whole: the tensor's shape; flat: the elements of the piece [count], which are read, or set by a load."""
        self.whole, self.tensors = torch.Size(whole), dict(_blocks(whole, piece, flat))

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), self.whole),
            )
            for chunk, tensor in zip(self.__create_chunk_list__(), self.tensors.values(), strict=True)
        ]  # fmt: skip

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), tensor.shape) for at, tensor in self.tensors.items()]


class SavePlan(DefaultSavePlanner):
    """How torch's planner finds a block."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self.state_dict[index.fqn].tensors[tuple(index.offset)]


class LoadPlan(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Any = None, is_coordinator: bool = False) -> None:
        """Without what the default does to nested dictionaries, which would copy every block."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator
        self.flatten_state_dict = False

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        found: Tensor = self.state_dict[index.fqn].tensors[tuple(index.offset)]
        return found


def _blocks(whole: Place, piece: Piece, flat: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """(offsets in the whole, view of `flat`)."""
    split, share = piece.split, list(whole)
    if split is not None:
        share[split.dim] //= split.parts
    begin = 0
    for offsets, sizes in rectangles(piece.start, piece.end, tuple(share)):
        count = math.prod(sizes)
        block = flat.narrow(0, begin, count).view(sizes)
        begin += count
        if split is None:
            yield offsets, block
            continue
        dim = split.dim
        for low, there, length in _runs(offsets[dim], sizes[dim], split, piece.part, whole[dim]):
            yield (*offsets[:dim], there, *offsets[dim + 1 :]), block.narrow(dim, low - offsets[dim], length)


def rectangles(start: int, end: int, shape: Place) -> Iterator[tuple[Place, Place]]:
    """(offsets, sizes) of the blocks that the flat range [start, end) of a row-major tensor consists of, in order."""
    if len(shape) <= 1:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while start < end:
        number, inside = divmod(start, row)
        whole = (end - start) // row
        if inside or not whole:  # part of a row
            stop = min(end, (number + 1) * row)
            for offsets, sizes in rectangles(inside, stop - number * row, shape[1:]):
                yield (number, *offsets), (1, *sizes)
        else:
            stop = start + whole * row
            yield (number, *([0] * (len(shape) - 1))), (whole, *shape[1:])
        start = stop


def _runs(first: int, count: int, split: Split, part: int, whole: int) -> Iterator[tuple[int, int, int]]:
    """(place in the share, place in the whole, length) along the cut dimension, at most one for each section."""
    lengths = [length // split.parts for length in split.sections or (whole,)]
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        begin = end - length
        low, high = max(first, begin), min(first + count, end)
        if low < high:  # the sections before this one take `parts` times as much in the whole
            yield low, begin * split.parts + part * length + low - begin, high - low
