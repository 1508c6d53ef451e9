"""Promises of data_prep: what is written, what is refused, what a second run does."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import xxhash
from filelock import FileLock
from tokenizers import models, pre_tokenizers

from data_prep import output
from data_prep.__main__ import main
from data_prep.errors import PrepareError
from data_prep.manifest import FILE_NAME
from data_prep.prefix import Prefix
from data_prep.prepare import _Run
from data_prep.settings import split_of
from data_prep.sizes import parse_size
from data_prep.tokenizer import load_prepared_tokenizer
from tests.data_prep import runs
from tests.data_prep.runs import content, documents_of, manifest_of
from tests.data_prep.test_tokenizer import bpe_file

OPTIONS = ("--validation-share", "0.25", "--shard-size", "4kb")
ROOT = Path(__file__).parents[2]
UNLISTED = {FILE_NAME, "report.md", "report.png", "rejected.jsonl"}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Forty documents of up to 600 bytes."""
    rng = random.Random(0)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number:02}.txt").write_text("".join(rng.choices("abc ä\n", k=rng.randrange(1, 600))))
    return tmp_path / "texts"


def prepare(texts: Path, output: Path, *more: str) -> int:
    return main(["--input", str(texts), "--output", str(output), *OPTIONS, *more])


def test_every_document_lands_whole_in_the_split_its_text_decides(texts: Path, tmp_path: Path) -> None:
    assert prepare(texts, tmp_path / "out", "--compression", "none") == 0
    expected: dict[str, dict[str, list[int]]] = {"train": {}, "validation": {}}
    for path in sorted(texts.iterdir()):
        split = split_of(path.read_text(), share=0.25, seed=0)
        expected[split][f"texts/{path.name}"] = [*path.read_bytes(), 256]
    assert {split: documents_of(tmp_path / "out", split) for split in expected} == expected
    assert len(expected["validation"]) > 3


def test_the_manifest_states_every_file_with_its_size_and_hash(texts: Path, tmp_path: Path) -> None:
    assert prepare(texts, tmp_path / "out") == 0
    manifest = manifest_of(tmp_path / "out")
    files = content(tmp_path / "out")
    stated = {name: (entry.bytes, entry.xxh64) for name, entry in manifest.files()}
    del files[FILE_NAME]
    assert stated == {name: (len(data), xxhash.xxh64(data).hexdigest()) for name, data in files.items()}
    for name, split in ((name, split["text"]) for name, split in manifest.splits.items()):
        tokens = list(documents_of(tmp_path / "out", name).values())
        assert np.load(tmp_path / "out" / name / "text" / "lengths.npy").tolist() == [
            len(document) for document in tokens
        ]
        assert split.documents == len(tokens) and split.tokens == sum(len(document) for document in tokens)
        assert split.text_bytes == split.tokens - split.documents
        assert [shard.documents for shard in split.shards] == [
            shard["samples"] for shard in json.loads(files[f"{name}/text/index.json"])["shards"]
        ]
    assert len(manifest.splits["train"]["text"].shards) > 2


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    """Also where a limit on the text makes what some of them have read useless."""
    texts = runs.write_corpus(tmp_path / "texts")
    assert runs.prepare(texts, tmp_path / "one", "--max-bytes", "2mb") == 0
    process = runs.start(texts, tmp_path / "three", "--max-bytes", "2mb", "--workers", "3", "--quiet")
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0 and error == "" and output.startswith("prepared ")
    assert runs.alive(process.pid) == []
    assert content(tmp_path / "one") == content(tmp_path / "three")


def test_more_documents_move_no_document_to_another_split(texts: Path, tmp_path: Path) -> None:
    assert prepare(texts, tmp_path / "before") == 0
    for number in range(30):
        (texts / f"0{number}-more.txt").write_text(f"more {number}" * 20)
    assert prepare(texts, tmp_path / "after") == 0
    for split in ("train", "validation"):
        before, after = (documents_of(tmp_path / name, split) for name in ("before", "after"))
        assert before.items() < after.items()


def test_a_second_run_is_done_at_once_and_changes_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(texts, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare(texts, tmp_path / "out") == 0
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_content_is_never_overwritten(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(texts, tmp_path / "out") == 0
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("precious")
    before = content(tmp_path)
    assert prepare(texts, tmp_path / "out", "--seed", "1") == 2
    assert "prepared with other settings (seed 0, now 1); name another --output" in capsys.readouterr().err
    assert prepare(texts, tmp_path / "foreign") == 2
    assert "holds something else (no manifest.json); name another --output" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_prepared_folder_that_lost_a_shard_is_not_called_prepared(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(texts, tmp_path / "out") == 0
    (tmp_path / "out" / "train" / "text" / "shard.00000.mds.zstd").unlink()
    assert prepare(texts, tmp_path / "out") == 2
    assert "shard.00000.mds.zstd is missing; remove " in capsys.readouterr().err


def test_what_an_older_version_left_is_removed(texts: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "train").mkdir(parents=True)
    (tmp_path / ".out.partial" / "train" / "shard.00000.mds").write_text("half")
    assert prepare(texts, tmp_path / "out") == prepare(texts, tmp_path / "other") == 0
    assert content(tmp_path / "out") == content(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "texts"]


def test_two_runs_at_once_do_not_mix(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(tmp_path / ".out.lock"):
        assert prepare(texts, tmp_path / "out") == 2
    assert "another process is preparing" in capsys.readouterr().err


def test_an_empty_corpus_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    assert prepare(tmp_path / "texts", tmp_path / "out") == 2
    assert "the corpus is empty: 1 files, no text in them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_few_documents_for_the_split_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the only document")
    assert prepare(tmp_path / "texts", tmp_path / "out") == 2
    assert "too few documents for the split: of 1 documents" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--validation-share", "1", "must be above 0 and below 1"),
    ("--shard-size", "100", "must be from 4096"),
    ("--seed", "-1", "must be from 0"),
    ("--workers", "0", "must be 1 or more"),
    ("--max-bytes", "0", "must be at least 1 byte"),
    ("--max-bad-share", "2", "must be from 0 to 1"),
    ("--max-document-size", "1gb", "must be from 1 to 268435456"),
])  # fmt: skip
def test_an_impossible_option_is_refused_with_its_limits(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
) -> None:
    assert prepare(texts, tmp_path / "out", option, value) == 2
    error = capsys.readouterr().err
    assert option in error and message in error


def test_a_tokenizer_file_is_copied_and_read_back(texts: Path, tmp_path: Path) -> None:
    path = bpe_file(tmp_path, "[STOP]")
    assert prepare(texts, tmp_path / "out", "--tokenizer", str(path), "--end-token", "[STOP]") == 0
    path.unlink()
    tokenizer = load_prepared_tokenizer(tmp_path / "out")
    manifest = manifest_of(tmp_path / "out")
    assert manifest.dtype == "uint16" and manifest.tokenizer.vocabulary == tokenizer.vocabulary > 257
    for split in ("train", "validation"):
        for name, tokens in documents_of(tmp_path / "out", split).items():
            assert tokens[-1] == manifest.tokenizer.end_of_document == 0 and 0 not in tokens[:-1]
            assert tokenizer.decode(tokens) == (tmp_path / name).read_text()


def test_a_tokenizer_file_replaced_during_the_run_changes_nothing(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = bpe_file(tmp_path)
    assert prepare(texts, tmp_path / "expected", "--tokenizer", str(path)) == 0
    arrange = _Run._arrange

    def replaced(run: _Run, prefix: Prefix) -> object:
        path.write_text(path.read_text() + "\n")
        return arrange(run, prefix)

    monkeypatch.setattr(_Run, "_arrange", replaced)
    assert prepare(texts, tmp_path / "out", "--tokenizer", str(path)) == 0
    assert content(tmp_path / "out") == content(tmp_path / "expected")


def test_a_tokenizer_file_replaced_before_the_work_begins_is_refused(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bpe_file(tmp_path)
    begin = _Run._begin

    def replaced(run: _Run, resumed: bool) -> None:
        path.write_text(path.read_text() + "\n")
        begin(run, resumed)

    monkeypatch.setattr(_Run, "_begin", replaced)
    assert prepare(texts, tmp_path / "out", "--tokenizer", str(path)) == 2
    assert f"{path} has changed since the run began; run again" in capsys.readouterr().err
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_written_where_it_points(texts: Path, tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    assert prepare(texts, tmp_path / "link") == prepare(texts, tmp_path / "other") == 0
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "link") == content(tmp_path / "other")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_mount_point_is_refused_before_the_work(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    message = f"name a folder below it, as --output {tmp_path}/out/prepared"
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: True)
        assert prepare(texts, tmp_path / "out") == 2
    assert message in capsys.readouterr().err

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "replace", lambda a, b: (busy if str(b).endswith("/out") else os.rename)(a, b))
        assert prepare(texts, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "texts"]


def test_the_path_that_cannot_be_written_is_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert prepare(texts, tmp_path / "file" / "out") == 2
    error = capsys.readouterr().err
    assert f"data_prep: {tmp_path}/file: " in error and "what is done is kept" not in error
    assert prepare(texts, tmp_path / ("n" * 250)) == 2
    assert "File name too long. Choose a shorter name, and run the same command again" in capsys.readouterr().err
    assert main(["--input", str(texts), "--output", ""]) == 2
    assert "--output is empty; name a folder" in capsys.readouterr().err


def test_an_output_below_the_input_is_not_read(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(texts, tmp_path / "elsewhere") == 0
    assert prepare(texts, texts / "out", "--work", str(texts / "work")) == 0
    before = content(texts / "out")
    assert {name for name, data in content(tmp_path / "elsewhere").items() if before[name] != data} == set()
    assert prepare(texts, texts / "out") == 0
    assert "already prepared" in capsys.readouterr().out and content(texts / "out") == before
    assert prepare(texts, texts) == 2
    assert "holds something else (no manifest.json)" in capsys.readouterr().err


def test_ctrl_c_while_modules_are_imported_is_one_line(texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-B", "-m", "data_prep", "--input", str(texts), "--output", "out"]
    process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stderr is not None
    assert any(line.endswith("data_prep.early_stop\n") for line in process.stderr)
    process.send_signal(signal.SIGINT)
    lines = [line for line in process.stderr if not line.startswith("import time:")]
    assert process.wait() == 130 and lines == ["data_prep: stopped before it began\n"]


def test_a_tokenizer_file_that_changed_since_is_refused(texts: Path, tmp_path: Path) -> None:
    assert prepare(texts, tmp_path / "out", "--tokenizer", str(bpe_file(tmp_path))) == 0
    stored = tmp_path / "out" / "tokenizer.json"
    stored.write_text(stored.read_text() + "\n")
    with pytest.raises(PrepareError, match=r"tokenizer\.json has changed: sha256"):
        load_prepared_tokenizer(tmp_path / "out")


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "texts").mkdir()
    for number in range(20):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(f"w{69_000 + number} w1")
    assert prepare(tmp_path / "texts", tmp_path / "out", "--tokenizer", str(tmp_path / "words.json")) == 0
    assert manifest_of(tmp_path / "out").dtype == "uint32"
    found = [
        tokens
        for split in ("train", "validation")
        for tokens in documents_of(tmp_path / "out", split, dtype="<u4").values()
    ]
    assert sorted(found) == [[69_000 + number, 1, 70_000] for number in range(20)]


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_size(text) for text in ("17", "4kb", "16MB", "1 gb")] == [17, 4096, 1 << 24, 1 << 30]


def test_the_default_corpus_is_prepared_by_one_command(tmp_path: Path) -> None:
    command = [sys.executable, "-B", "-m", "data_prep", "--default-corpus", "--max-bytes", "1mb"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    progress = [line.startswith("data_prep: ") and line.endswith(" left") for line in done.stderr.splitlines()]
    assert "vocabulary 257" in done.stdout and all(progress), done.stderr
    manifest = manifest_of(tmp_path / "out")
    assert 500_000 < sum(split["text"].text_bytes for split in manifest.splits.values()) <= 1 << 20
