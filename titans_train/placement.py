"""What decides a rank's memory and messages beside the model. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Placement:
    """T, R: as in plan_memory.py."""

    tensor: int  # T
    replicas: int  # R
    sequence_parallel: bool
    item: int  # bytes of a parameter and an activation
    sequences: int  # of a micro-batch
    length: int  # tokens of a sequence on a rank: its shard
    accumulation: int
    checkpointing: bool
    shards: int = 1  # of a sequence
    pieces: int = 1  # of a scan
    wave: int = 1  # micro-batches forwarded before their backward
    strategy: str = "wavefront"
    carries: bool = False  # rows go on in the next batch

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def stream_tokens(self) -> float:
        """Tokens of the residual stream that this rank holds."""
        return self.tokens / (self.tensor if self.sequence_parallel else 1)
