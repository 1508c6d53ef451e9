"""Manifests of prepared data that are as their own hash says, and name or declare what cannot be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from data_prep.errors import PrepareError
from data_prep.tokenizer import load_prepared_tokenizer
from tests.data.corpus import prepare_folder
from tests.data.folders import copy_of, open_store
from tests.hostile.refusals import DEEP, Change, listing, little_memory, pickled, put, refused, zipped
from titans_train.data import DataError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("good"))


def sealed(data: dict[str, Any]) -> str:
    """The manifest's text with the right hash of itself."""
    text = json.dumps({**data, "manifest_xxh64": "0" * 16}, indent=1, sort_keys=True) + "\n"
    line = '"manifest_xxh64": "{}"'
    return text.replace(line.format("0" * 16), line.format(xxhash.xxh64_hexdigest(text)))


SPLIT = ("splits", "train", "text")
SHARD = (*SPLIT, "shards", 0)
OUTSIDE = ["/etc/passwd", "../../outside", "..", ".", "", "a/b", "a\\b", "..\\x", "a\0b", "a\ud800", "\x1b[31m",
           "x" * 5_000,
           "-", ".hidden", "a\n", 7, None, True, ["a"], {"a": 1}]  # fmt: skip
NUMBERS = [-1, 2**63, 10**15 + 2**60, "12", 1.5, True, None, float("nan"), float("inf"), [], 10**400]

NAMES = {
    "raw": put(*SHARD, "raw", "name"), "compressed": put(*SHARD, "compressed", "name"),
    "index": put(*SPLIT, "index", "name"), "lengths": put(*SPLIT, "lengths", "name"),
    "others": put("others", 0, "name"),
}  # fmt: skip
COUNTS = {
    "raw": put(*SHARD, "raw", "bytes"), "compressed": put(*SHARD, "compressed", "bytes"),
    "index": put(*SPLIT, "index", "bytes"), "lengths": put(*SPLIT, "lengths", "bytes"),
    "others": put("others", 0, "bytes"), "documents": put(*SHARD, "documents"), "tokens": put(*SHARD, "tokens"),
    "all documents": put(*SPLIT, "documents"), "all tokens": put(*SPLIT, "tokens"), "text": put(*SPLIT, "text_bytes"),
    "vocabulary": put("tokenizer", "vocabulary"), "end": put("tokenizer", "end_of_document"),
}  # fmt: skip


def petabyte(data: dict[str, Any]) -> None:
    """10^15 tokens, told alike in every place."""
    shard, split = data["splits"]["train"]["text"]["shards"][0], data["splits"]["train"]["text"]
    split["tokens"] += 10**15 - shard["tokens"]
    shard["tokens"] = 10**15


def trillion(data: dict[str, Any]) -> None:
    """2^40 documents, told alike in every place."""
    shard, split = data["splits"]["train"]["text"]["shards"][0], data["splits"]["train"]["text"]
    split["documents"] += 2**40 - shard["documents"]
    shard["documents"] = 2**40


def many_documents(data: dict[str, Any]) -> None:
    """As many as an MDS file can number, in one of a few kilobytes."""
    shard, split = data["splits"]["train"]["text"]["shards"][0], data["splits"]["train"]["text"]
    split["documents"] += 2**32 - 1 - shard["documents"]
    shard["documents"] = 2**32 - 1


def renamed(name: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        data["splits"]["train"][name] = data["splits"]["train"].pop("text")

    return change


CHANGES: dict[str, tuple[Change, str]] = {
    **{f"name of {what}: {value!r:.20}": (put(value), "name is") for what, put in NAMES.items() for value in OUTSIDE},
    **{f"{what}: {value!r:.20}": (put(value), "") for what, put in COUNTS.items() for value in NUMBERS},
    **{f"source {name!r:.20}": (renamed(name), "no name of a source") for name in OUTSIDE if isinstance(name, str)
       if name not in ("-", ".hidden")},
    "10^15 tokens": (petabyte, "below 4294967296"),
    "2^40 documents": (trillion, "expected a number from 1 to below 4294967296"),
    "2^32 documents": (many_documents, "bytes or more, raw/bytes is"),
    "2^52 bytes": (put(*SHARD, "raw", "bytes")(2**52), "expected a number from 0 to below 4294967296"),
    "lengths of a petabyte": (put(*SPLIT, "lengths", "bytes")(10**12), "documents have less"),
    "a hash of other letters": (put(*SHARD, "raw", "xxh64")("../../../../x"), "16 hexadecimal digits"),
    "no list of shards": (put(*SPLIT, "shards")({"a": 1}), "not a complete manifest"),
    "shards of numbers": (put(*SPLIT, "shards")([1, 2]), "not a complete manifest"),
    "one shard twice": (put(*SPLIT, "shards", 1, "raw", "name")("shard.00000.mds"), "named twice"),
    "another key": (put(*SHARD, "raw", "path")("/etc"), "not a complete manifest"),
    "no split": (put("splits")([]), "not a complete manifest"),
    "dtype float64": (put("dtype")("float64"), "neither uint16 nor uint32"),
    "dtype object": (put("dtype")("O"), "neither uint16 nor uint32"),
    "dtype a list": (put("dtype")(["uint16"]), "neither uint16 nor uint32"),
    "settings a list": (put("settings")([]), "expected an object"),
    "tool of escapes": (put("tool")("\x1b]0;x\x07"), "tool is"),
    "tokenizer a text": (put("tokenizer")("bytes"), "not a complete manifest"),
    "tokenizer a path": (
        put("tokenizer", "file")({"name": "../../x", "bytes": 1, "xxh64": "0" * 16}),
        "tokenizer/file",
    ),
    "tokenizer kind": (put("tokenizer", "kind")("../x"), "tokenizer/kind"),
    "tokenizer hash": (put("tokenizer", "sha256")("x"), "64 hexadecimal digits"),
    "tokenizer of another file": (lambda data: data["tokenizer"].update(kind="huggingface"), "expected tokenizer.json"),
    "version": (put("version")("\x1b[31m"), "this code reads 2"),
}  # fmt: skip


def test_a_manifest_that_names_or_declares_what_cannot_be_is_refused(good: Path, tmp_path: Path) -> None:
    """Hundreds of them: by the reader of training, before anything is made of a name or a size."""
    folder = copy_of(good, tmp_path)
    manifest = folder / "manifest.json"
    text, before = manifest.read_text(), listing(folder)
    for name, (change, message) in CHANGES.items():
        data = json.loads(text)
        change(data)
        manifest.write_text(sealed(data), "utf-8")
        with little_memory(), pytest.raises(DataError) as raised:
            open_store(folder, tmp_path / "work")
        error = str(raised.value)
        assert message in error and "manifest" in error and len(error) < 1_000 and error.isprintable(), (name, error)
    manifest.write_text(text)
    assert listing(folder).keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "work"]
    assert {path.name for path in (tmp_path / "work").rglob("*") if path.is_file()} == set()


@pytest.mark.parametrize("name", ["name of raw: '../../outside'", "10^15 tokens", "source '..'", "tokenizer a path"])
def test_verify_data_refuses_it_too(name: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = copy_of(good, tmp_path)
    data = json.loads((folder / "manifest.json").read_text())
    CHANGES[name][0](data)
    (folder / "manifest.json").write_text(sealed(data))
    assert "manifest.json" in refused(capsys, "verify-data", str(folder))


CONTENTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "an archive": lambda mark: zipped(pickled(mark)),
    "deep lists": lambda mark: DEEP.encode(),
    "deep objects": lambda mark: b'{"a":' * 100_000,
    "not UTF-8": lambda mark: b'{"version": "\xff"}',
    "UTF-16": lambda mark: '{"version": 2}'.encode("utf-16"),
    "NaN": lambda mark: b'{"version": NaN}',
    "Infinity": lambda mark: b'{"version": -Infinity}',
    "ten thousand digits": lambda mark: b'{"version": ' + b"9" * 10_000 + b"}",
    "a list": lambda mark: b"[]",
    "a number": lambda mark: b"2",
    "null": lambda mark: b"null",
    "a key twice": lambda mark: b'{"version": 2, "version": 2}',
    "empty": lambda mark: b"",
    "NULs": lambda mark: bytes(1000),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_is_no_manifest_is_refused(name: str, tmp_path: Path, capsys: Capture) -> None:
    folder, mark = tmp_path / "data", tmp_path / "mark"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(CONTENTS[name](mark))
    with little_memory():
        assert "manifest" in refused(capsys, "verify-data", str(folder))
        with pytest.raises(DataError, match="manifest"):
            open_store(folder, tmp_path)
        with pytest.raises((PrepareError, ValueError), match="manifest"):
            load_prepared_tokenizer(folder)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "huge"])
def test_a_manifest_without_an_end_is_refused(kind: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    manifest = folder / "manifest.json"
    if kind == "device":
        manifest.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "folder":
        manifest.mkdir()
    else:
        manifest.touch()
        os.truncate(manifest, 1 << 40)
    with little_memory():
        assert "manifest.json" in refused(capsys, "verify-data", str(folder))
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_store(folder, tmp_path)
