"""What becomes of the records: sources, duplicates, bad ones, names, a limit on the text."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main
from tests.data_prep.runs import content, documents_of, manifest_of

Capture = pytest.CaptureFixture[str]
SPLITS = ("train", "validation")


def texts(count: int, size: int = 300, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefgh \n", k=rng.randrange(1, size))) + str(number) for number in range(count)]


def write_lines(path: Path, records: list[dict[str, Any] | str]) -> Path:
    """Records, or lines as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare(path: Path, output: Path, *more: str) -> int:
    options = ("--validation-share", "0.3", "--shard-size", "4kb", "--workers", "1")
    return main(["--input", str(path), "--output", str(output), *options, *more])


def all_documents(folder: Path) -> dict[str, str]:
    """name -> text of both splits and all sources."""
    return {
        name: bytes(tokens[:-1]).decode()
        for split in SPLITS
        for source in sorted(path.name for path in (folder / split).iterdir())
        for name, tokens in documents_of(folder, split, source).items()
    }


def test_each_source_gets_folders_of_its_own(tmp_path: Path) -> None:
    names = ("wiki", "Common Crawl", "Common/Crawl", "../up", "ünï", None)
    records = [{"text": text, "from": names[number % 6]} for number, text in enumerate(texts(180))]
    path = write_lines(tmp_path / "in.jsonl", [*records])
    assert prepare(path, tmp_path / "out", "--source-field", "from") == 0
    manifest = manifest_of(tmp_path / "out")
    for split in SPLITS:
        folders = sorted(manifest.splits[split])
        assert [name.split("-")[:2] for name in folders if name.startswith("Common")] == [["Common", "Crawl"]] * 2
        assert [name for name in folders if not name.startswith("Common")] == ["n", "text", "up", "wiki"]
        assert sorted(path.name for path in (tmp_path / "out" / split).iterdir()) == folders
        for name, entry in manifest.splits[split].items():
            found = documents_of(tmp_path / "out", split, name)
            assert len(found) == entry.documents > 0
            assert [len(tokens) for tokens in found.values()] == np.load(
                tmp_path / "out" / split / name / "lengths.npy"
            ).tolist()
            assert sum(len(tokens) for tokens in found.values()) == entry.tokens == entry.text_bytes + entry.documents
    wiki = {name: text for split in SPLITS for name, text in documents_of(tmp_path / "out", split, "wiki").items()}
    assert sorted(wiki) == sorted(f"in.jsonl:{number + 1}" for number in range(0, 180, 6))
    assert all_documents(tmp_path / "out") == {f"in.jsonl:{n}": record["text"] for n, record in enumerate(records, 1)}


def test_documents_without_a_source_are_counted(tmp_path: Path, capsys: Capture) -> None:
    """Here up to a limit on the text, within a unit."""
    records = [{"text": text, **({"from": "wiki"} if number % 3 else {})} for number, text in enumerate(texts(180))]
    path = write_lines(tmp_path / "in.jsonl", [*records])
    limit = sum(len(record["text"]) for record in records[:90])
    assert prepare(path, tmp_path / "out", "--source-field", "from", "--max-bytes", str(limit)) == 0
    assert "30 documents name no source in field from\n" in capsys.readouterr().out
    assert manifest_of(tmp_path / "out").report["without_source"] == 30
    assert "30 documents name no source in the field `from`." in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet", "in.txt"])
def test_a_source_field_that_no_document_has_is_refused(name: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / name
    records: list[dict[str, Any] | str] = [{"text": text, "origin": "wiki"} for text in texts(60)]
    if name == "in.jsonl":
        write_lines(path, records)
    elif name == "in.parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("|".join(texts(60)))
    assert prepare(path, tmp_path / "out", "--source-field", "from", "--document-separator", "|") == 2
    seen = (
        "the input has text files only, which have no fields; "
        if name == "in.txt"
        else f"fields of {name}: origin, text; "
    )
    assert (
        f"none of 60 documents names a source in the field 'from' (--source-field); {seen}name another field, or "
        "leave the option out"
    ) in capsys.readouterr().err


def test_a_source_field_that_no_document_has_is_named_early(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": f"{number} {'x' * 60}"} for number in range(20_000)])
    assert prepare(path, tmp_path / "out", "--source-field", "from") == 2
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("none of ")]
    assert len(said) == 1 and said[0].endswith(" documents so far names a source in the field 'from'")
    assert 10_000 <= int(said[0].split()[2].replace(",", "")) < 20_000


def test_a_document_longer_than_a_shard_has_a_shard_of_its_own(tmp_path: Path) -> None:
    """Also the first, also two in a row, also the last."""
    long = {number: f"{number} " * 3000 for number in (0, 40, 41, 119)}
    expected = [long.get(number, text) for number, text in enumerate(texts(120))]
    path = write_lines(tmp_path / "in.jsonl", [{"text": text} for text in expected])
    assert prepare(path, tmp_path / "out", "--compression", "none") == 0
    assert all_documents(tmp_path / "out") == {f"in.jsonl:{n}": text for n, text in enumerate(expected, 1)}
    shards = [shard for split in manifest_of(tmp_path / "out").splits.values() for shard in split["text"].shards]
    assert sorted(shard.documents for shard in shards if shard.raw.bytes > 4096) == [1, 1, 1, 1]


def test_a_first_document_beyond_the_limit_on_the_text_is_named(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": "x" * 50}, {"text": "y"}])
    assert prepare(path, tmp_path / "out", "--max-bytes", "10") == 2
    assert "--max-bytes 10: the first document alone is longer, 50 bytes" in capsys.readouterr().err


def test_too_many_sources_are_refused(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": f"text {n}", "url": f"http://{n}"} for n in range(1100)])
    assert prepare(path, tmp_path / "out", "--source-field", "url") == 2
    assert "the documents name 1,100 sources ('http://0', 'http://1' ...), at most 1,000" in capsys.readouterr().err


def test_of_equal_documents_the_first_stays(tmp_path: Path, capsys: Capture) -> None:
    different = texts(40)
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": text} for text in [*different, *different[:7]]])
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": text} for text in different[5:9]])
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert "left out: 11 exact duplicates" in capsys.readouterr().out
    expected = {f"in/a.jsonl:{number}": text for number, text in enumerate(different, 1)}
    assert all_documents(tmp_path / "out") == expected
    assert manifest_of(tmp_path / "out").report["duplicates"] == 11
    assert prepare(tmp_path / "in", tmp_path / "all", "--keep-duplicates") == 0
    assert len(all_documents(tmp_path / "all")) == 51
    assert "kept: 11 exact duplicates" in capsys.readouterr().out


def test_lines_are_counted_in_the_file_even_where_it_was_cut_into_units(tmp_path: Path) -> None:
    """Here three units, with blank and bad lines on the way."""
    rng = random.Random(1)
    records: list[dict[str, Any] | str] = [
        {"text": f"{number} " + "".join(rng.choices("abc ", k=4000))} for number in range(160)
    ]
    for number in (20, 70, 120, 150):
        records[number] = ""
    records[130] = "{broken"
    path = write_lines(tmp_path / "in.jsonl", records)
    assert prepare(path, tmp_path / "out", "--shard-size", "1mb") == 0
    expected = {f"in.jsonl:{n}": record["text"] for n, record in enumerate(records, 1) if isinstance(record, dict)}
    assert all_documents(tmp_path / "out") == expected
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert (rejected["file"], rejected["line"], rejected["reason"]) == ("in.jsonl", 131, "broken JSON")


BAD = ["{broken", '{"other": 1}', '{"text": 5}', '{"text": ""}', "[1]", '{"text": 6}']


def test_bad_records_are_counted_and_kept_aside(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [*({"text": text} for text in texts(94)), *BAD])
    assert prepare(path, tmp_path / "out", "--max-bad-share", "0.06") == 0
    output = capsys.readouterr().out
    assert "rejected: 2 x not text, first in.jsonl:97 (field 'text' is a number)" in output
    assert "rejected: 1 x broken JSON, first in.jsonl:95" in output
    lines = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"]) for line in lines] == [
        (95, "broken JSON"), (96, "missing field"), (97, "not text"), (98, "empty"), (99, "not an object"),
        (100, "not text"),
    ]  # fmt: skip
    assert set(lines[0]) == {"file", "line", "reason", "detail", "excerpt"} and lines[0]["excerpt"] == "{broken"
    report = manifest_of(tmp_path / "out").report
    assert (report["records"], report["documents"]) == (100, 94)
    assert {reason: entry["records"] for reason, entry in report["rejected"].items()} == {
        "broken JSON": 1, "empty": 1, "missing field": 1, "not an object": 1, "not text": 2,
    }  # fmt: skip
    assert "| not text | 2 | in.jsonl:97 |" in (tmp_path / "out" / "report.md").read_text()


def test_too_many_bad_records_end_the_run_and_a_higher_limit_goes_on(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [*({"text": text} for text in texts(94)), *BAD])
    assert prepare(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "5 of 99 records are bad, a share of 0.0505; at most 0.01 may be (--max-bad-share)" in error
    assert f"Most often (2 times): not text, as in {path}:97: field 'text' is a number" in error
    assert not (tmp_path / "out").exists()
    assert prepare(path, tmp_path / "out", "--max-bad-share", "0.06") == 0
    assert "1 of 1 units were tokenised before" in capsys.readouterr().out


def test_a_wrong_field_ends_the_run_early(tmp_path: Path, capsys: Capture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"body": "x" * 60} for _ in range(30_000)])
    assert prepare(path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert " records read so far are bad, a share of 1; " in error
    assert f"missing field, as in {path}:1: field 'text' is missing; fields: body" in error
    units = list((tmp_path / ".out.partial" / "units").glob("*.json"))
    assert len(units) == 3  # of 9


def test_a_limit_on_the_text_stops_before_the_document_that_would_pass_it(tmp_path: Path, capsys: Capture) -> None:
    records: list[dict[str, Any] | str] = [{"text": text} for text in texts(3000)]
    records[100] = records[2900] = "{broken"
    path = write_lines(tmp_path / "in.jsonl", records)
    whole = [len(record["text"]) if isinstance(record, dict) else 0 for record in records]
    limit = sum(whole[:2000])
    assert prepare(path, tmp_path / "out", "--max-bytes", str(limit), "--shard-size", "1mb") == 0
    assert len(all_documents(tmp_path / "out")) == 1999
    report = manifest_of(tmp_path / "out").report
    assert report["rejected"]["broken JSON"]["records"] == 1 and report["stopped_at_max_bytes"]
    assert prepare(path, tmp_path / "less", "--max-bytes", str(limit - 1), "--shard-size", "1mb") == 0
    assert len(all_documents(tmp_path / "less")) == 1998


def test_more_data_move_no_document_to_another_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": text} for text in texts(60)])
    assert prepare(tmp_path / "in", tmp_path / "before") == 0
    write_lines(tmp_path / "in" / "a.jsonl", [{"text": text} for text in texts(60, seed=1)])
    assert prepare(tmp_path / "in", tmp_path / "after") == 0
    for split in SPLITS:
        before, after = (documents_of(tmp_path / name, split) for name in ("before", "after"))
        assert before.items() < after.items()


def test_a_separator_cuts_text_files_into_documents(tmp_path: Path) -> None:
    (tmp_path / "all.txt").write_text("<end>".join(texts(50)))
    assert prepare(tmp_path / "all.txt", tmp_path / "out", "--document-separator", "<end>") == 0
    assert all_documents(tmp_path / "out") == {f"all.txt:{n}": text for n, text in enumerate(texts(50), 1)}


def test_a_too_long_document_is_rejected(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": "x" * 5000}, *({"text": text} for text in texts(120))])
    assert prepare(path, tmp_path / "out", "--max-document-size", "4kb") == 0
    assert manifest_of(tmp_path / "out").report["rejected"]["too long"]["first"] == "in.jsonl:1"


def test_the_report_is_a_table_and_a_picture(tmp_path: Path) -> None:
    records = [{"text": text, "from": f"s{number % 12}"} for number, text in enumerate(texts(300))]
    path = write_lines(tmp_path / "in.jsonl", [*records])
    assert prepare(path, tmp_path / "out", "--source-field", "from") == 0
    report = (tmp_path / "out" / "report.md").read_text()
    lengths = sorted(len(record["text"]) + 1 for record in records)
    total = next(line for line in report.splitlines() if line.startswith("| all | 300 |"))
    assert total.endswith(f" {lengths[-1]} |") and report.count("| validation | s") == 12
    picture = content(tmp_path / "out")["report.png"]
    assert picture.startswith(b"\x89PNG") and b"Software" not in picture and len(picture) > 10_000


def test_a_damaged_file_ends_the_run_unless_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps({"text": f"document {number} " * 9}) + "\n" for number in range(3000))
    (tmp_path / "good.jsonl").write_text(lines.replace("document", "text"))
    whole = gzip.compress(lines.encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    inputs = [
        "--input",
        str(tmp_path / "good.jsonl"),
        str(tmp_path / "cut.jsonl.gz"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(inputs) == 2
    error = capsys.readouterr().err
    assert "1 damaged files, as " in error and "cut.jsonl.gz:" in error and "--skip-damaged-files" in error
    assert main([*inputs, "--skip-damaged-files"]) == 0
    documents = sum(entry["text"].documents for entry in manifest_of(tmp_path / "out").splits.values())
    assert 4000 < documents < 6000
    (rejected,) = (json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert rejected["reason"] == "unreadable file" and rejected["line"] == documents - 3000 + 1


def test_file_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(30):
        path = os.fsencode(tmp_path / "texts") + b"/caf\xe9-%02d.txt" % number
        with open(path, "w") as file:
            file.write(f"text number {number} " * 5)
    assert (
        main(["--input", str(tmp_path / "texts"), "--output", str(tmp_path / "out"), "--validation-share", "0.3"]) == 0
    )
    names = [name for split in ("train", "validation") for name in documents_of(tmp_path / "out", split)]
    assert len(names) == 30 and all(name.encode("utf-8") and "caf" in name for name in names)
