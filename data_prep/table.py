"""The rows of a Parquet file, or of those of its row groups that begin in a range of bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.records import MISSING_FIELD, UNREADABLE_FILE, ReadSettings, Refusal
from data_prep.storage import BLOCK_BYTES, StorageError, StorageFile

_BATCH_BYTES = 8 << 20  # of decoded text, about
_BATCH_ROWS = 1024  # at most
_NO_FILE = (OSError, pa.ArrowException)

Row = tuple[int, tuple[Any, Any]]  # its number from 1, and (text, source) as they are, or (why there is none, None)


def rows(file: StorageFile, begin: int, end: int, settings: ReadSettings) -> Iterator[Row]:
    """The rows of the row groups whose first byte is in [begin, end).

    A damaged row group gives its rows before the damage, and a Refusal with the number of its last row for the rest.
    A file without a sound footer gives one Refusal, in the range that begins at 0.
    """
    try:
        table = _open(file, begin, end, settings)
    except StorageError:
        raise
    except _NO_FILE as error:
        if begin == 0:
            yield 1, (Refusal(UNREADABLE_FILE, f"not a Parquet file, or damaged: {error}"), None)
        return
    first = 1
    for index in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(index)
        if begin <= _first_byte(group) < end:
            yield from _group_rows(table, index, first, settings)
            first += group.num_rows


def _open(file: StorageFile, begin: int, end: int, settings: ReadSettings) -> pq.ParquetFile:
    """Columns with a dictionary stay indices into it: a long text that many rows share is in memory once."""
    source = pa.PythonFile(file, mode="r")
    metadata = pq.read_metadata(source)
    wanted = [name for name in (settings.text_field, settings.source_field) if name is not None]
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    shared = {
        column.path_in_schema
        for group in groups
        if begin <= _first_byte(group) < end
        for column in _columns(group, wanted)
        if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY"
    }
    return pq.ParquetFile(
        source, metadata=metadata, read_dictionary=sorted(shared), buffer_size=BLOCK_BYTES, pre_buffer=False
    )


def _columns(group: pq.RowGroupMetaData, names: Sequence[str]) -> list[pq.ColumnChunkMetaData]:
    """Those that have one of the names, or are a part of it."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return [column for column in columns if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names)]


def _group_rows(table: pq.ParquetFile, index: int, first: int, settings: ReadSettings) -> Iterator[Row]:
    group, schema = table.metadata.row_group(index), table.schema_arrow
    text = _path(schema, settings.text_field)
    source = _path(schema, settings.source_field) if settings.source_field is not None else None
    last = first + group.num_rows - 1
    if text is None:
        missing = f"no column {settings.text_field!r}; columns: {', '.join(sorted(schema.names))}"
        yield from ((number, (Refusal(MISSING_FIELD, missing), None)) for number in range(first, last + 1))
        return
    number = first
    try:
        for batch in _batches(table, index, [path for path in (text, source) if path is not None]):
            texts = _values(batch, text)
            sources = _values(batch, source) if source is not None else repeat(None, batch.num_rows)
            yield from enumerate(zip(texts, sources, strict=True), start=number)
            number += batch.num_rows
    except StorageError:
        raise
    except _NO_FILE as error:
        yield last, (Refusal(UNREADABLE_FILE, f"damaged from row {number} of these to row {last}: {error}"), None)


def _batches(table: pq.ParquetFile, index: int, paths: Sequence[list[str]]) -> Iterator[pa.RecordBatch]:
    """The columns of one row group, in batches of a few MiB."""
    names = [".".join(path) for path in paths]
    group = table.metadata.row_group(index)
    size = sum(column.total_uncompressed_size for column in _columns(group, names))
    batch_rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, size)))
    yield from table.iter_batches(batch_rows, [index], names, use_threads=False)


def _first_byte(group: pq.RowGroupMetaData) -> int:
    column = group.column(0)
    return int(column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset)


def _path(schema: pa.Schema, name: str) -> list[str] | None:
    """Column and struct fields of a dotted name; a column that holds the whole name goes first. None: not there."""
    if name in schema.names:
        return [name]
    column, *fields = name.split(".")
    if column not in schema.names:
        return None
    kind = schema.field(column).type
    for field in fields:
        if not pa.types.is_struct(kind) or kind.get_field_index(field) < 0:
            return None
        kind = kind.field(field).type
    return [column, *fields]


def _values(batch: pa.RecordBatch, path: list[str]) -> Iterator[Any]:
    """One by one: what rows share is made anew for each."""
    column = batch.column(path[0])
    if len(path) > 1:
        column = pc.struct_field(column, path[1:])
    return map(_value, column)


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error.object
