"""Shard plans to tasks, one at a time; and which units' tokens are still needed by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.arrange import ShardPlan, document_name
from data_prep.columns import Array, Columns
from data_prep.shards import ShardTask
from data_prep.units import file_of


class Tasks(Sequence[ShardTask]):
    """A task is made when it is asked for: names of documents take more memory than all else about them."""

    def __init__(self, columns: Columns, files: Sequence[str], plans: Sequence[ShardPlan]) -> None:
        self._columns, self._files, self._plans = columns, files, plans

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[ShardTask]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> ShardTask:  # type: ignore[override]
        plan, columns = self._plans[number], self._columns
        rows = plan.rows
        places = zip(columns.file[rows].tolist(), columns.line[rows].tolist(), strict=True)
        names = [document_name(self._files[file], line) for file, line in places]
        parts = columns.unit[rows], columns.offset[rows], columns.tokens[rows]
        return ShardTask(plan.split, plan.source, plan.number, names, *parts)


class UnitUsers:
    """How many shards still have to be written from each unit; tokens that none needs are deleted."""

    def __init__(self, folder: Path, units: int, needed: Sequence[Array]) -> None:
        """`needed`: for each shard the unit of each of its documents."""
        self._folder = folder
        self._count = np.zeros(units, np.int64)
        for numbers in needed:
            self._count[np.unique(numbers)] += 1
        for number in np.flatnonzero(self._count == 0):
            self._delete(int(number))

    def used(self) -> list[int]:
        return [int(number) for number in np.flatnonzero(self._count)]

    def release(self, numbers: Array) -> None:
        """A shard with documents of these units is written."""
        for number in np.unique(numbers):
            self._count[number] -= 1
            if self._count[number] == 0:
                self._delete(int(number))

    def _delete(self, number: int) -> None:
        file_of(self._folder, number, "tokens").unlink(missing_ok=True)
