"""What to prepare and how: all that the command line says, checked."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep import space
from data_prep.errors import PrepareError
from data_prep.readers import ReadSettings
from data_prep.settings import Settings, check_document_bytes
from data_prep.sources import UNIT_BYTES, SourceFile, Unit, make_units
from data_prep.tokenizer import Tokenizer

_SMALLEST_UNIT = 256 << 10
_UNITS = 128  # of a small corpus: enough for workers to end together
_WORTH_A_WORKER = 32 << 20  # bytes of input: starting a process for less takes longer than it saves


@dataclass
class Job:
    """What to prepare and how. PrepareError where a setting cannot be."""

    files: list[SourceFile]
    left_out: dict[str, int]
    fingerprint: str
    tokenizer: Tokenizer
    output: str
    read: ReadSettings = field(default_factory=ReadSettings)
    settings: Settings = field(default_factory=Settings)
    work: str | None = None
    restart: bool = False
    workers: int | None = None  # None: one per CPU, fewer for little input
    max_bad_share: float = 0.01
    quiet: bool = False
    skip_damaged_files: bool = False

    def __post_init__(self) -> None:
        self.settings.check()
        check_document_bytes(self.read.max_document_bytes)
        if self.workers is not None and self.workers < 1:
            raise PrepareError(f"--workers {self.workers}: must be 1 or more, or left out for one per CPU")
        if not 0 <= self.max_bad_share <= 1:
            raise PrepareError(f"--max-bad-share {self.max_bad_share}: must be from 0 to 1, as 0.01")

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def wanted(self) -> dict[str, Any]:
        """All that decides the content; recorded in the manifest."""
        read = {"input": self.fingerprint, **asdict(self.read)}
        return {**asdict(self.settings), **read, "tokenizer": self.tokenizer.sha256}

    def units(self) -> list[Unit]:
        size = min(UNIT_BYTES, max(_SMALLEST_UNIT, self.bytes // _UNITS))
        return make_units(self.files, size, self.read.separator)

    def worker_count(self) -> int:
        """A function of the options, the input and the machine; the content does not depend on it."""
        if self.workers is not None:
            return self.workers
        size = space.text_bytes(self.files, self.settings.max_bytes)
        return min(_cpus(), 1 + size // _WORTH_A_WORKER)


def _cpus() -> int:
    """That this process may use, where the system says so."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
