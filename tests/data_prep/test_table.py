import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.readers import Document, ReadSettings, Rejected, read_unit
from data_prep.sources import find_files, make_units
from tests.data_prep.test_readers import read, texts


def test_parquet_rows_are_the_same_in_units_of_every_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(1, 51)]}), path, row_group_size=7)
    expected = [(n, f"row {n}") for n in range(1, 51)]
    for size in range(1, path.stat().st_size + 2, 13):
        assert texts(read(path, unit_bytes=size)) == expected, size


def test_a_row_that_is_no_document_is_rejected_and_reading_goes_on(tmp_path: Path) -> None:
    values = pa.array([b"one", b"caf\xe9", None, b" ", b"x" * 101, b"six"])
    pq.write_table(pa.table({"text": values}), tmp_path / "binary.parquet")
    pq.write_table(pa.table({"text": values.view(pa.string())}), tmp_path / "text.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "dictionary.parquet")
    settings = ReadSettings(max_document_bytes=100)
    expected = [(1, "one"), (2, "invalid UTF-8"), (3, "not text"), (4, "empty"), (5, "too long"), (6, "six")]
    assert texts(read(tmp_path / "binary.parquet", settings=settings)) == expected
    assert texts(read(tmp_path / "text.parquet", settings=settings)) == expected
    assert texts(read(tmp_path / "numbers.parquet")) == [(1, "not text"), (2, "not text")]
    assert texts(read(tmp_path / "dictionary.parquet")) == [(1, "a"), (2, "b"), (3, "a")]
    (rejected,) = read(tmp_path / "other.parquet")
    assert isinstance(rejected, Rejected) and rejected.reason == "missing field"
    assert rejected.detail == "no column 'text'; columns: body"


@pytest.mark.parametrize("field", ["text", "meta.text"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary()])
def test_a_long_text_that_many_rows_share_is_in_memory_once(tmp_path: Path, field: str, kind: pa.DataType) -> None:
    text = "0123456789" * 50_000
    shared = pa.DictionaryArray.from_arrays(pa.array([*[0] * 500, 1, None], pa.int32()), pa.array([text, "b"], kind))
    column = shared if field == "text" else pa.StructArray.from_arrays([shared], ["text"])
    pq.write_table(pa.table({field.partition(".")[0]: column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    (unit,) = make_units(find_files([str(tmp_path)])[0])
    start = pa.total_allocated_bytes()
    peak, found = 0, []
    tracemalloc.start()
    for record in read_unit(unit, ReadSettings(text_field=field)):
        peak = max(peak, pa.total_allocated_bytes() - start)
        found.append(len(record.text) if isinstance(record, Document) else record.reason)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [*[len(text)] * 500, 1, "not text"]
    assert peak < 16 << 20 and python < 16 << 20


def test_columns_that_leave_their_dictionary_are_read_whole(tmp_path: Path) -> None:
    values = [f"{n:06} " + "x" * 1000 for n in range(3000)] + [None, "again"] * 3
    nested = [[value] for value in values]
    pq.write_table(pa.table({"text": values, "list": nested}), tmp_path / "a.parquet", row_group_size=2000)
    found = read(tmp_path)
    assert [r.text if isinstance(r, Document) else None for r in found] == values
    assert {text for _, text in texts(read(tmp_path, settings=ReadSettings(text_field="list")))} == {"not text"}


def test_a_damaged_row_group_costs_only_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {n} " + "x" * 500 for n in range(1, 13)]})
    pq.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    for size in (1 << 20, 3000):
        found = [(number, text[:5]) for number, text in texts(read(path, unit_bytes=size))]
        assert found == [(1, "row 1"), (2, "row 2"), (3, "row 3"), (4, "row 4"), (8, "unrea"),
                         (9, "row 9"), (10, "row 1"), (11, "row 1"), (12, "row 1")]  # fmt: skip
    path.write_bytes(bytes(content[:-3]))
    for size in (1 << 20, 3000):
        assert texts(read(path, unit_bytes=size)) == [(1, "unreadable file")]
