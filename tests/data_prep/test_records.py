import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import PrepareError
from data_prep.readers import REASONS, Document, ReadSettings, Rejected
from tests.data_prep.test_readers import line, read, texts

BAD_LINES = {
    "broken JSON": (b'{"text": "x"', "Expecting ',' delimiter"),
    "not an object": (b"[1]", "holds a list, expected an object"),
    "missing field": (b'{"body": "a", "id": 1}', "field 'text' is missing; fields: body, id"),
    "not text": (b'{"text": null}', "field 'text' is null"),
    "invalid UTF-8": (b'{"text": "\xe9"}', "byte 0xe9 at offset 10"),
    "empty": (b'{"text": " \\n"}', "nothing but white space"),
    "too long": (b'{"text": "' + b"x" * 101 + b'"}', "101 bytes, at most 100 are allowed (--max-document-size)"),
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


@pytest.mark.parametrize("source", [None, "", ["a"], True, float("nan")])
def test_a_source_that_is_no_text_counts_as_none(tmp_path: Path, source: object) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("x", site=source))
    assert read(tmp_path, settings=ReadSettings(source_field="site")) == [Document(1, 0, "x", None)]


@pytest.mark.parametrize(("source", "text"), [(7, "7"), (0, "0"), (-1.5, "-1.5"), ("7", "7")])
def test_a_source_that_is_a_number_is_its_text(tmp_path: Path, source: object, text: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line("x", site=source))
    pq.write_table(pa.table({"text": ["x"], "site": [source]}), tmp_path / "b.parquet")
    settings = ReadSettings(source_field="site")
    assert read(tmp_path, settings=settings) == [Document(1, number, "x", text) for number in (0, 1)]


@pytest.mark.parametrize(
    ("value", "words"),
    [(1, "a number"), (1.5, "a number"), (True, "true or false"), ([], "a list"), ({}, "an object"), (None, "null")],
)
def test_a_text_that_is_none_is_told_in_words(tmp_path: Path, value: object, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}))
    (rejected,) = read(tmp_path)
    assert isinstance(rejected, Rejected) and rejected.detail == f"field 'text' is {words}"


def test_half_a_surrogate_pair_in_a_source_becomes_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "site": "a\\ud800"}')
    assert read(tmp_path, settings=ReadSettings(source_field="site")) == [Document(1, 0, "x", "a?")]


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(PrepareError, match="the separator is empty; give a text that stands between documents"):
        ReadSettings(separator="")
    with pytest.raises(PrepareError, match="at most 0 bytes per document: must be 1 or more"):
        ReadSettings(max_document_bytes=0)
    with pytest.raises(PrepareError, match=r"the separator '\\udcff' is not valid UTF-8; give a text that is"):
        ReadSettings(separator="\udcff")
    with pytest.raises(PrepareError, match=r"the field 'a\.\\udcff' is not valid UTF-8"):
        ReadSettings(source_field="a.\udcff")
