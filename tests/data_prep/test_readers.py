import gzip
import json
import os
import shutil
import tracemalloc
import zlib
from collections import deque
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.errors import PrepareError
from data_prep.readers import Document, ReadSettings, Rejected, read_unit
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
    assert len(records) > (5_000 if suffix == "gz" else 2_000)
    assert damage == "overwritten" or rejected.line == len(records) + 1  # the line that is in pieces
    documents = [record for record in records if isinstance(record, Document)][:1000]
    assert texts(list(documents)) == [(n + 1, f"{n}" * 50) for n in range(len(documents))]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_all_whole_lines_of_a_small_archive_that_is_cut_off_are_read(tmp_path: Path, suffix: str) -> None:
    content = b"".join(line(f"{n * 7919 % 104729} {n}") for n in range(20_000))  # less than one read
    packer = (
        zlib.compressobj(wbits=31) if suffix == "gz" else zstandard.ZstdCompressor(write_checksum=True).compressobj()
    )
    packed = packer.compress(content) + packer.flush()
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(packed[:-3])
    *records, rejected = read(tmp_path)
    assert texts(records) == [(n + 1, f"{n * 7919 % 104729} {n}") for n in range(20_000)]
    assert isinstance(rejected, Rejected) and (rejected.line, rejected.reason) == (20_001, "unreadable file")
    assert rejected.detail == "damaged from here on: the file ends in the middle"


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


@pytest.mark.parametrize("when", ["before", "between", "while"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_was_rewritten_with_the_same_size_ends_the_reading(tmp_path: Path, name: str, when: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": ["row"] * 3000}), path)
    else:
        path.write_bytes(gzip.compress(LINES * 9) if name.endswith(".gz") else LINES * 9)
    units = make_units(find_files([str(path)])[0], unit_bytes=60)
    if when == "between":
        list(read_unit(units[0], SETTINGS))
    reader = read_unit(units[0] if when != "between" else units[-1], SETTINGS)
    if when == "while":
        next(reader)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    with pytest.raises(
        PrepareError, match=rf"{name} was written to .*; let nothing write it, and start again with --rest"
    ):
        list(reader)


def test_a_reader_that_leaves_off_tells_of_a_change_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    (unit,) = make_units([replace(file, mtime_ns=0) for file in find_files([str(path)])[0]])
    reader = read_unit(unit, SETTINGS)
    next(reader)
    reader.check()
    os.utime(path, ns=(1, 1))
    with pytest.raises(PrepareError, match=r"a\.jsonl is another one now than when its reading began"):
        reader.check()


def test_an_object_that_was_rewritten_with_the_same_size_ends_the_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with s3_server() as address:
        set_environment(environment(address), monkeypatch)
        url = upload(address, tmp_path, "texts")
        (unit,) = make_units(find_files([url])[0])
        reader = read_unit(unit, SETTINGS)
        next(reader)
        (tmp_path / "a.jsonl").write_bytes(LINES.replace(b"eins", b"EINS"))
        upload(address, tmp_path, "texts")
        with pytest.raises(PrepareError, match=r"a\.jsonl (is another one now|was written to)"):
            list(reader)


def test_files_whose_names_are_not_utf_8_are_read(tmp_path: Path) -> None:
    for suffix, content in {".txt": b"text", ".jsonl": line("text"), ".jsonl.gz": gzip.compress(line("text"))}.items():
        Path(os.path.join(tmp_path, os.fsdecode(b"caf\xe9" + suffix.encode()))).write_bytes(content)
    shutil.move(_table(tmp_path), os.path.join(tmp_path, os.fsdecode(b"caf\xe9.parquet")))
    assert texts(read(tmp_path)) == [(1, "text")] * 4


def _table(folder: Path) -> Path:
    pq.write_table(pa.table({"text": ["text"]}), folder / "b.parquet")
    return folder / "b.parquet"


@pytest.mark.parametrize("character", ["\x01", "ä", "漢", "\U0001f600", "x"])
def test_a_text_of_the_longest_size_is_read_however_it_is_escaped(tmp_path: Path, character: str) -> None:
    size = 2 << 20
    text = character * (size // len(character.encode()))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "more": "y" * 100_000}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text + character}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text, "more": "y" * 20_000_000}) + "\n")
    document, rejected, longer = read(tmp_path, settings=ReadSettings(max_document_bytes=len(text.encode())))
    assert isinstance(document, Document) and document.text == text
    assert isinstance(rejected, Rejected) and isinstance(longer, Rejected)
    limit = f"{len(text.encode()):,}"
    assert rejected.detail.endswith(f" bytes, at most {limit} are allowed (--max-document-size)")
    assert longer.detail.startswith("a line of more than ")
    assert longer.detail.endswith(f" bytes; at most {limit} of text are allowed (--max-document-size)")


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
    with pytest.raises(StorageError, match=r"a\.jsonl: no connection to the storage; check the network"):
        list(half)
