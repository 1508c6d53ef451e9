"""What a run has done, as its checkpoints keep it."""

from __future__ import annotations

from dataclasses import dataclass

from titans_train.data.cursor import Cursor
from titans_train.plan import Plan


@dataclass(frozen=True)
class Progress:
    """Global batches that were read, where the data go on, and steps whose update was withheld (not finite)."""

    step: int
    cursor: Cursor
    skipped: tuple[int, ...] = ()

    @classmethod
    def start(cls, plan: Plan) -> Progress:
        return cls(0, Cursor.constant(plan.config.training.global_batch_size))

    @property
    def sequences(self) -> int:
        """Read so far."""
        return self.cursor.sequences(self.step)
