"""The mesh of processes: tensor varies fastest, then sequence, then data (Megatron-LM's order)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    rank: int
    world_size: int
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        if self.world_size % self.model:
            raise ValueError(
                f"{self.world_size} processes do not form a mesh of tensor {self.tensor} x sequence {self.sequence}; "
                f"start a multiple of {self.model}"
            )

    @property
    def model(self) -> int:
        """Number of ranks that one model and its sequences are split over."""
        return self.tensor * self.sequence

    @property
    def data(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // self.model

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.rank // self.tensor % self.sequence

    @property
    def data_rank(self) -> int:
        return self.rank // self.model

    def shard_rank(self, shard: int) -> int:
        """The rank with this shard of this rank's sequences, and the same share of the weights."""
        return self.rank + (shard - self.sequence_rank) * self.tensor

    def neighbour(self, side: str) -> int | None:
        """The rank with the shard to the "left" or "right"; None at the sequence's end."""
        shard = self.sequence_rank + (1 if side == "right" else -1)
        return self.shard_rank(shard) if 0 <= shard < self.sequence else None

    @property
    def is_first(self) -> bool:
        """The one rank that writes files and the console."""
        return self.rank == 0
