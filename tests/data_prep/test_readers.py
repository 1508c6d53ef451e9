import gzip
import json
import tracemalloc
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.errors import PrepareError
from data_prep.readers import REASONS, Document, ReadSettings, Rejected, read_unit
from data_prep.sources import find_files, make_units
from data_prep.storage import StorageError
from tests.s3 import environment, s3_server, set_environment, upload

SETTINGS = ReadSettings()


def read(*paths: Path | str, settings: ReadSettings = SETTINGS, unit_bytes: int = 1 << 20) -> list[Document | Rejected]:
    """All records, with the lines of earlier units added to those of later ones."""
    files, _, _ = find_files([str(path) for path in paths])
    result: list[Document | Rejected] = []
    before: dict[str, int] = {}
    for unit in make_units(files, unit_bytes, settings.separator):
        reader = read_unit(unit, settings)
        for record in reader:
            line = record.line + before.get(unit.files[record.file].path, 0)
            result.append(
                Document(line, record.file, record.text, record.source)
                if isinstance(record, Document)
                else Rejected(line, record.file, record.reason, record.detail, record.excerpt)
            )
        for file, lines in zip(unit.files, reader.lines, strict=True):
            before[file.path] = before.get(file.path, 0) + lines
    return result


def texts(records: list[Document | Rejected]) -> list[tuple[int, str]]:
    return [(record.line, record.text if isinstance(record, Document) else record.reason) for record in records]


def line(text: str, **more: object) -> bytes:
    return json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n"


LINES = b"\xef\xbb\xbf" + line("eins") + b"\r\n" + line("ä€\u2028x") + b"  \n{broken\n" + line("\nzwei").strip()
EXPECTED = [(1, "eins"), (3, "ä€\u2028x"), (5, "broken JSON"), (6, "\nzwei")]


def test_json_lines_are_the_same_in_units_of_every_size(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": LINES, "b.jsonl": LINES.replace(b"\n", b"\r\n") + b"\r\n"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        for size in range(1, len(content) + 2):
            assert texts(read(path, unit_bytes=size)) == EXPECTED, (name, size)


def test_separated_texts_are_the_same_in_units_of_every_size(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffeins<|end|>\nzwei ä€<|end|><|end|>drei\r\n<|en<|end|> \n".encode())
    expected = [(1, "eins"), (2, "\nzwei ä€"), (3, "empty"), (4, "drei\r\n<|en")]
    for size in range(1, path.stat().st_size + 2):
        assert texts(read(path, settings=ReadSettings(separator="<|end|>"), unit_bytes=size)) == expected, size


def test_parquet_rows_are_the_same_in_units_of_every_size(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(1, 51)]}), path, row_group_size=7)
    expected = [(n, f"row {n}") for n in range(1, 51)]
    for size in range(1, path.stat().st_size + 2, 13):
        assert texts(read(path, unit_bytes=size)) == expected, size


def test_small_files_of_all_kinds_share_a_unit(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwhole\r\n")
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(LINES[:40]) + gzip.compress(LINES[40:]))
    (tmp_path / "d.json.zst").write_bytes(zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:]))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"packed"))
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "f.parquet")
    records = read(tmp_path)
    whole = [(1, "whole\r\n")], [(1, "packed")], [(1, "row")]
    assert texts(records) == [*whole[0], *EXPECTED * 3, *whole[1], *whole[2]]
    assert [record.file for record in records] == [0, *[1] * 4, *[2] * 4, *[3] * 4, 4, 5]


def test_fields_may_be_nested_in_json_and_parquet_and_the_source_may_be_absent(tmp_path: Path) -> None:
    rows = [{"meta": {"body": "x", "source": "web"}}, {"meta": {"body": "y", "source": None}}, {"meta": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    settings = ReadSettings(text_field="meta.body", source_field="meta.source")
    for name, reason in {"a.jsonl": "missing field", "b.parquet": "not text"}.items():
        *documents, rejected = read(tmp_path / name, settings=settings)
        assert documents == [Document(1, 0, "x", "web"), Document(2, 0, "y", None)]
        assert isinstance(rejected, Rejected) and (rejected.line, rejected.reason) == (3, reason)


def test_a_key_with_a_dot_goes_before_a_nested_one(tmp_path: Path) -> None:
    rows = [{"a.b": "flat", "a": {"b": "nested"}}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert texts(read(tmp_path, settings=ReadSettings(text_field="a.b"))) == [(1, "flat")] * 2


BAD_LINES = {
    "broken JSON": (b'{"text": "x"', "Expecting ',' delimiter"),
    "not an object": (b"[1]", "holds a list, expected an object"),
    "missing field": (b'{"body": "a", "id": 1}', "field 'text' is missing; fields: body, id"),
    "not text": (b'{"text": null}', "field 'text' is null"),
    "invalid UTF-8": (b'{"text": "\xe9"}', "byte 0xe9 at offset 10"),
    "empty": (b'{"text": " \\n"}', "nothing but white space"),
    "too long": (b'{"text": "' + b"x" * 101 + b'"}', "101 bytes, at most 100 are allowed"),
    "half a surrogate pair": (b'{"text": "a\\ud800"}', "character 0xd800 at 1"),
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_a_line_that_is_no_document_is_rejected_and_reading_goes_on(tmp_path: Path, reason: str) -> None:
    content, detail = BAD_LINES[reason]
    (tmp_path / "a.jsonl").write_bytes(line("before") + content + b"\n" + line("after"))
    before, rejected, after = read(tmp_path, settings=ReadSettings(max_document_bytes=100))
    assert before == Document(1, 0, "before", None) and after == Document(3, 0, "after", None)
    assert isinstance(rejected, Rejected) and (rejected.line, rejected.reason) == (2, reason)
    assert detail in rejected.detail and rejected.excerpt.encode()[:9] == content[:9] and reason in REASONS


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"text": ' + b"1" * 5000 + b"}", b'{"text": "\x00"}'])
def test_what_the_json_library_cannot_read_is_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    assert texts(read(tmp_path)) == [(1, "broken JSON")]


def test_a_whole_file_that_is_no_document_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_bytes(b"x" * 101)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"x" * 5000))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"whole")[:-4])
    (tmp_path / "f.txt").write_bytes(b"\xef\xbb\xbf" + b"x" * 100)
    reasons = ["invalid UTF-8", "empty", "too long", "too long", "unreadable file", "x" * 100]
    assert texts(read(tmp_path, settings=ReadSettings(max_document_bytes=100))) == [(1, reason) for reason in reasons]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_what_comes_before_the_damage_of_a_compressed_file_is_read(tmp_path: Path, suffix: str, damage: str) -> None:
    content = b"".join(line(f"{n}" * 50) for n in range(30_000))
    packed = (
        gzip.compress(content) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    at = len(packed) // 3
    bad = packed[:at] if damage == "cut off" else packed[:at] + b"\xff" * 100 + packed[at + 100 :]
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(bad)
    *records, rejected = read(tmp_path)
    assert isinstance(rejected, Rejected) and rejected.reason == "unreadable file"
    assert suffix == "zst" or len(records) > 1000
    documents = [record for record in records if isinstance(record, Document)][:1000]
    assert texts(list(documents)) == [(n + 1, f"{n}" * 50) for n in range(len(documents))]


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


def test_memory_does_not_grow_with_the_file_or_with_a_line_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line("x" * 1000) * 20_000 + line("y" * 30_000_000) + line("after"))
    (unit,) = make_units(find_files([str(path)])[0], unit_bytes=1 << 30)
    tracemalloc.start()
    rejected, last = deque(read_unit(unit, ReadSettings(max_document_bytes=10_000)), maxlen=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(rejected, Rejected) and rejected.reason == "too long" and last.line == 20_002
    assert peak < 12 << 20


def test_a_file_that_has_changed_or_gone_ends_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("text")
    (unit,) = make_units(find_files([str(path)])[0])
    path.write_text("more text")
    with pytest.raises(PrepareError, match=r"a\.txt has 9 bytes now, it had 4 when it was found; let nothing write it"):
        list(read_unit(unit, SETTINGS))
    path.unlink()
    with pytest.raises(StorageError, match=r"a\.txt: no such file"):
        list(read_unit(unit, SETTINGS))


def test_a_server_that_goes_away_is_no_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.txt"):
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(LINES))
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "e.parquet")
    with s3_server() as address:
        set_environment(environment(address), monkeypatch)
        url = upload(address, tmp_path, "texts")
        files = find_files([url])[0]
        assert texts(read(url)) == texts(read(tmp_path))
        (unit,) = make_units(files)
        half = read_unit(unit, SETTINGS)
        assert isinstance(next(half), Document)
    with pytest.raises(StorageError, match=r"b\.jsonl\.gz: no connection to the storage; check the network"):
        list(half)
