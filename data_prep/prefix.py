"""Units that are done without a gap from the first on: what is decided early depends on these alone."""

from __future__ import annotations

from collections import Counter

from data_prep.units import UnitRecord


class Prefix:
    """Takes records in any order. Its sums do not depend on which worker was faster."""

    def __init__(self, max_bytes: int | None) -> None:
        self.records: list[UnitRecord] = []
        self.documents = self.text_bytes = 0
        self.rejected: Counter[str] = Counter()  # by reason
        self._max_bytes = max_bytes
        self._waiting: dict[int, UnitRecord] = {}

    @property
    def full(self) -> bool:
        """It holds a document that passes --max-bytes: no later unit is needed."""
        return self._max_bytes is not None and self.text_bytes > self._max_bytes

    def add(self, record: UnitRecord) -> bool:
        """Whether the prefix has grown."""
        self._waiting[record.number] = record
        before = len(self.records)
        while not self.full and len(self.records) in self._waiting:
            following = self._waiting.pop(len(self.records))
            self.records.append(following)
            self.documents += following.document_count
            self.text_bytes += following.text_bytes
            self.rejected.update(following.rejected_counts)
        return len(self.records) > before
