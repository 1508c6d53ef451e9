"""All documents of the input as columns of numbers, in input order: what is decided about them needs no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.manifest import DEFAULT_SOURCE
from data_prep.sources import SourceFile, Unit
from data_prep.units import WHOLE_FILE, Rows, UnitRecord, lines_before, read_rows

BYTES_PER_DOCUMENT = 110  # of the main process's memory while it arranges: measured, with the sorting

Array = NDArray[Any]


@dataclass
class Columns:
    """One row per document."""

    unit: Array  # uint32
    offset: Array  # int64, of its first token in the unit's tokens
    tokens: Array  # uint32, the end-of-document token included
    text_bytes: Array  # uint32
    file: Array  # uint32, index into the files of the input
    line: Array  # int64, within the file, or WHOLE_FILE
    source: Array  # uint32, index into `source_names`
    validation: Array  # bool
    source_names: list[str]  # as the documents give them, in sorted order

    def __len__(self) -> int:
        return len(self.unit)

    def keep(self, which: Any) -> None:
        """Only the rows of a slice or mask stay."""
        for field in fields(self):
            if field.name != "source_names":
                setattr(self, field.name, getattr(self, field.name)[which])


def load_columns(
    folder: Path, units: Sequence[Unit], records: Sequence[UnitRecord], files: Sequence[SourceFile]
) -> tuple[Columns, tuple[Array, Array]]:
    """From the units' tables; and the two halves of the documents' hashes."""
    names = sorted({name or DEFAULT_SOURCE for record in records for name in record.sources})
    source_index = {name: index for index, name in enumerate(names)}
    file_index = {file.path: index for index, file in enumerate(files)}
    parts: list[dict[str, Array]] = []
    for unit, record, before in zip(units, records, lines_before(units, records), strict=False):
        rows = read_rows(folder, record)
        to_source = np.array([source_index[name or DEFAULT_SOURCE] for name in record.sources] or [0], np.uint32)
        parts.append(_unit_columns(rows, unit, to_source, file_index, before))
    joined = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])} if parts else {}
    hashes = joined.pop("hash_high"), joined.pop("hash_low")
    return Columns(**joined, source_names=names), hashes


def _unit_columns(
    rows: Rows, unit: Unit, to_source: Array, file_index: dict[str, int], before: list[int]
) -> dict[str, Array]:
    to_file = np.array([file_index[file.path] for file in unit.files], np.uint32)
    first_line = np.array(before, np.int64)
    tokens = rows["tokens"].copy()
    ends = np.cumsum(tokens, dtype=np.int64)
    in_file = rows["line"] != WHOLE_FILE
    return {
        "hash_high": rows["hash_high"].copy(),
        "hash_low": rows["hash_low"].copy(),
        "unit": np.full(len(rows), unit.number, np.uint32),
        "offset": ends - tokens,
        "tokens": tokens,
        "text_bytes": rows["text_bytes"].copy(),
        "file": to_file[rows["file"]],
        "line": np.where(in_file, rows["line"] + first_line[rows["file"]], WHOLE_FILE),
        "source": to_source[rows["source"]],
        "validation": rows["validation"].copy(),
    }
