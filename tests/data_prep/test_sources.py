import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import PrepareError
from data_prep.sources import Document, default_corpus, find_files


def read(*paths: Path, text_field: str = "text") -> list[Document]:
    return list(find_files([str(path) for path in paths], text_field).documents())


def test_a_folder_gives_its_texts_in_sorted_order_and_counts_the_rest(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/c.py", "image.png", ".hidden/x.txt", "empty.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("" if name.startswith("empty") else f"text of {name}")
    corpus = find_files([str(tmp_path)], "text")
    top = tmp_path.name
    names = [document.name for document in corpus.documents()]
    assert names == [f"{top}/a/c.py", f"{top}/a/z.md", f"{top}/b.txt"]
    assert corpus.skipped == {"unknown kind of file": 1, "empty document": 1}


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert len(read(tmp_path, tmp_path / "a.txt")) == 1


def test_each_line_of_jsonl_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps({"body": "one\ntwo"}), "", json.dumps({"body": "ä", "id": 2})]))
    assert read(path, text_field="body") == [Document("a.jsonl:1", "one\ntwo"), Document("a.jsonl:3", "ä")]


def test_each_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(600)], "id": list(range(600))}), path)
    assert read(path) == [Document(f"a.parquet:{n}", f"row {n}") for n in range(600)]


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"body": ["x"]}), path)


BAD_FILES = {
    "a text that is not UTF-8": (
        "a.txt", b"caf\xe9", r"a\.txt is not UTF-8: byte 0xe9 at offset 3; convert it \(iconv",
    ),  # fmt: skip
    "a line that is not UTF-8": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl:2 is not UTF-8"),
    "a broken line": ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2 is not JSON .*mend or remove the line"),
    "a line that is no object": ("a.jsonl", b"[1]", r"a\.jsonl:1 holds a list, expected an object"),
    "a missing field": (
        "a.jsonl", b'{"body": "a"}', r"a\.jsonl:1: field 'text' is missing; fields: \['body'\].*--text-field",
    ),  # fmt: skip
    "a field of another type": ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: field 'text' is a int"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: field 'text' holds half a surrogate"),
    "no Parquet": ("a.parquet", b"something else", r"a\.parquet is not a Parquet file"),
    "an unknown kind": ("a.pdf", b"", r"a\.pdf: unknown kind of file; known: \.md \.py \.txt \.jsonl \.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_by_name_with_the_remedy(tmp_path: Path, case: str) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrepareError, match=message):
        read(tmp_path / name)


def test_a_missing_parquet_column_is_refused_with_the_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    with pytest.raises(PrepareError, match=r"a\.parquet: no column 'text'; columns: \['body'\]; use --text-field"):
        read(tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    code = (
        "import sys; sys.modules['pyarrow'] = None; from data_prep.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--input", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install pyarrow" in done.stderr


def test_an_input_that_does_not_exist_or_holds_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrepareError, match="nowhere: no such file or folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(PrepareError, match=r"no \.md .* file in .*; name a folder that holds text"):
        read(tmp_path)


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    found = [find_files([str(tmp_path)], "text").fingerprint]
    path.write_text("two!")
    found.append(find_files([str(tmp_path)], "text").fingerprint)
    os.utime(path, ns=(0, 0))
    found.append(find_files([str(tmp_path)], "text").fingerprint)
    (tmp_path / "b.txt").write_text("three")
    found.append(find_files([str(tmp_path)], "text").fingerprint)
    assert len(set(found)) == 4
    assert find_files([str(tmp_path)], "text").fingerprint == found[-1]


def test_the_default_corpus_is_the_standard_library_up_to_max_bytes() -> None:
    corpus = default_corpus(max_bytes=1_000_000)
    documents = list(corpus.documents())
    size = sum(len(document.text.encode()) for document in documents)
    assert 500_000 < size <= 1_000_000 and corpus.skipped["the rest, beyond --max-bytes"] == 1
    names = [file.name for file in corpus.files]
    assert "os.py" in names and "json/decoder.py" in names
    assert not [name for name in names if "site-packages" in name or "__pycache__" in name]
    assert [document.name for document in default_corpus(1_000_000).documents()] == [d.name for d in documents]
