"""Records that are no document, or name no source: how many are too many, and what is kept of them for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.durable import whole_file
from data_prep.errors import PrepareError
from data_prep.prefix import Prefix
from data_prep.records import EMPTY, UNREADABLE_FILE
from data_prep.sources import SourceFile, Unit
from data_prep.storage import open_input, open_stream
from data_prep.units import WHOLE_FILE, UnitRecord, lines_before, read_rejected, read_rows

FILE_NAME = "rejected.jsonl"
JUDGED_FROM = 10_000  # records; fewer are judged when all are read
_SHOWN_BYTES = 1 << 20
_SHOWN_FIELDS = 20


def rejected_records(
    folder: Path, units: Sequence[Unit], records: Sequence[UnitRecord], last_after: int | None = None
) -> Iterator[dict[str, Any]]:
    """file (its name), path, line in it (null for a whole file), reason, detail and excerpt, in input order.

    `last_after`: of the last unit only what lies before its document of that number.
    """
    befores = lines_before(units, records)
    for number, (unit, record, before) in enumerate(zip(units, records, befores, strict=False), start=1):
        for item in read_rejected(folder, record):
            if number == len(records) and last_after is not None and item["after"] > last_after:
                return
            file, line = item["file"], item["line"]
            yield {
                "file": unit.files[file].name, "path": unit.files[file].path,
                "line": None if line == WHOLE_FILE else line + before[file],
                **{key: item[key] for key in ("reason", "detail", "excerpt")},
            }  # fmt: skip


def place(item: dict[str, Any], key: str = "file") -> str:
    """file:line, or path:line."""
    return str(item[key]) if item["line"] is None else f"{item[key]}:{item['line']}"


def check_share(folder: Path, units: Sequence[Unit], prefix: Prefix, limit: float, final: bool) -> None:
    """PrepareError when more than `limit` of the records so far are bad. `final`: these are all there are.

    Empty ones are left out of the sum: nothing is lost with them.
    """
    counts = prefix.rejected - Counter({EMPTY: prefix.rejected[EMPTY]})
    total = prefix.documents + counts.total()
    if not (final or total >= JUDGED_FROM) or counts.total() <= limit * total:
        return
    reason, count = counts.most_common(1)[0]
    example = next(item for item in rejected_records(folder, units, prefix.records) if item["reason"] == reason)
    read = "records" if final else "records read so far"
    raise PrepareError(
        f"{counts.total():,} of {total:,} {read} are bad, a share of {counts.total() / total:.3g}; at most {limit:g} "
        f"may be (--max-bad-share). Most often ({count:,} times): {reason}, as in {place(example, 'path')}: "
        f"{example['detail']}. Mend the input, or run again with a higher --max-bad-share"
    )


def check_damaged(folder: Path, units: Sequence[Unit], prefix: Prefix) -> None:
    """PrepareError when a file could not be read to its end: nobody knows how many documents are lost with it."""
    count = prefix.rejected[UNREADABLE_FILE]
    if count:
        found = rejected_records(folder, units, prefix.records)
        example = next(item for item in found if item["reason"] == UNREADABLE_FILE)
        raise PrepareError(
            f"{count:,} damaged files, as {place(example, 'path')}: {example['detail']}. Fetch them again, leave them "
            "out, or keep what can be read of them with --skip-damaged-files"
        )


def write_rejected(
    path: Path, folder: Path, units: Sequence[Unit], records: Sequence[UnitRecord], last_after: int | None
) -> dict[str, dict[str, Any]]:
    """Write all of them to `path`, a JSON line each. Return reason -> records, and place and detail of the first."""
    found: dict[str, dict[str, Any]] = {}
    with whole_file(path) as stream:
        for item in rejected_records(folder, units, records, last_after):
            del item["path"]  # of this machine only
            first = {"records": 0, "first": place(item), "detail": item["detail"]}
            found.setdefault(item["reason"], first)["records"] += 1
            stream.write(json.dumps(item, sort_keys=True).encode("utf-8") + b"\n")
    return dict(sorted(found.items()))


def unnamed(folder: Path, records: Sequence[UnitRecord], last_after: int | None = None) -> int:
    """Documents that name no source; `last_after` as in `rejected_records`."""
    total = 0
    for number, record in enumerate(records, start=1):
        if None in record.sources:
            rows = read_rows(folder, record)[: last_after if number == len(records) else None]
            total += int((rows["source"] == record.sources.index(None)).sum())
    return total


def check_source_field(prefix: Prefix, files: Sequence[SourceFile], field: str | None) -> None:
    """PrepareError when documents were read and none names a source in the field."""
    if field is None or not prefix.documents or not prefix.none_named:
        return
    raise PrepareError(
        f"none of {prefix.documents:,} documents names a source in the field {field!r} (--source-field); "
        f"{_first_fields(files)}name another field, or leave the option out"
    )


def _first_fields(files: Sequence[SourceFile]) -> str:
    """What fields the input's first table or object has, as a part of a sentence; nothing where that is not known."""
    file = next((file for file in files if file.kind != "text"), None)
    if file is None:
        return "the input has text files only, which have no fields; "
    try:
        if file.kind == "parquet":
            with open_input(file.path) as opened:
                names = pq.ParquetFile(pa.PythonFile(opened, mode="r")).schema_arrow.names
        else:
            with open_stream(file.path, file.compression) as stream:
                names = list(json.loads(stream.readline(_SHOWN_BYTES)))
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return ""
    return f"fields of {file.name}: {', '.join(sorted(map(str, names))[:_SHOWN_FIELDS])}; "
