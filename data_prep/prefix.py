"""Units that are done without a gap from the first on: what is decided early depends on these alone."""

from __future__ import annotations

from collections import Counter

from data_prep.errors import PrepareError
from data_prep.manifest import DEFAULT_SOURCE
from data_prep.units import UnitRecord

MAX_SOURCES = 1000


class Prefix:
    """Takes records in any order. Its sums do not depend on which worker was faster."""

    def __init__(self, max_bytes: int | None) -> None:
        self.records: list[UnitRecord] = []
        self.documents = self.text_bytes = 0
        self.rejected: Counter[str] = Counter()  # by reason
        self.sources: set[str] = set()
        self.none_named = True  # no document so far names its source
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
            self.sources.update(name or DEFAULT_SOURCE for name in following.sources)
            self.none_named = self.none_named and set(following.sources) <= {None}
        return len(self.records) > before

    def check_sources(self) -> None:
        """PrepareError where the documents name too many sources."""
        if len(self.sources) > MAX_SOURCES:
            first, second = sorted(self.sources)[:2]
            raise PrepareError(
                f"the documents name {len(self.sources):,} sources ({first!r}, {second!r} ...), at most "
                f"{MAX_SOURCES:,} are possible, each a folder of shards; name a field with fewer values with "
                "--source-field, or leave it out"
            )
