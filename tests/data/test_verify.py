"""`verify-data` finds everything that is wrong with a prepared folder, and says what is in it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from data_prep.manifest import FileEntry, Manifest, ShardEntry, SplitEntry, describe_file
from tests.data.folders import QUICK, copy_of, flip, merged, read_manifest, with_entry, write_manifest
from tests.faults import proxy
from tests.s3 import BUCKET, client, environment, s3_server, set_environment, upload
from titans_train.data.cache import Cache
from titans_train.data.errors import DataError
from titans_train.data.verify import main, verify

SHARD = "train/text/shard.00001.mds"


def problems(folder: Path, threads: int = 2) -> list[str]:
    said: list[str] = []
    report = verify(str(folder), None, said.append, threads)
    assert [f"WRONG: {text}" for text in report.problems] == [line for line in said if line.startswith("WRONG")]
    assert ("all is right" in said[-1]) == (not report.problems)
    return list(report.problems)


def test_a_right_folder_is_right_and_described(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in prepared.rglob("*"))
    assert main([str(prepared), "--threads", "2", "--json", str(tmp_path / "report.json")]) == 0
    assert sorted((str(path), path.stat().st_mtime_ns) for path in prepared.rglob("*")) == before
    text, manifest = capsys.readouterr().out, read_manifest(prepared)
    entry = manifest.splits["train"]["text"]
    stored = sum(shard.stored.bytes for shard in entry.shards)
    row = next(line for line in text.splitlines() if line.startswith("train/text"))
    assert row.split() == [
        "train/text", f"{entry.documents:,}", f"{entry.tokens:,}", f"{entry.text_bytes:,}",
        f"{entry.text_bytes / entry.tokens:.3f}", f"{len(entry.shards)}", f"{stored:,}",
    ]  # fmt: skip
    assert f"tokenizer bytes, vocabulary 257, end of document 256, sha256 {manifest.tokenizer.sha256}" in text
    assert f"written by titans-train {manifest.tool}" in text and "M tokens/s" in text and "all is right" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] and report["problems"] == [] and report["settings"] == manifest.settings
    assert [(row["split"], row["tokens"]) for row in report["sources"]][0] == ("train", entry.tokens)


def test_a_raw_folder_and_several_sources_are_right(
    prepared_raw: Path, sources: dict[str, Path], tmp_path: Path
) -> None:
    assert problems(prepared_raw) == []
    folder = merged(sources, tmp_path / "merged")
    for file in read_manifest(folder).others:
        shutil.copyfile(list(sources.values())[-1] / file.name, folder / file.name)
    assert problems(folder) == []


def test_everything_that_is_wrong_is_reported_at_once(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    flip(folder / f"{SHARD}.zstd", 0.5)
    os.truncate(folder / "train/text/shard.00003.mds.zstd", 10)
    (folder / "train/text/shard.00004.mds.zstd").unlink()
    flip(folder / "validation/text/lengths.npy", -8)
    (folder / "validation/text/index.json").unlink()
    shutil.copyfile(folder / "train/text/shard.00000.mds.zstd", folder / "train/text/shard.00077.mds.zstd")
    found = problems(folder)
    assert [text.partition(": ")[0] for text in found] == [
        "train/text/shard.00077.mds.zstd is not in the manifest",
        f"{SHARD}.zstd is damaged",
        f"train/text/shard.00003.mds.zstd has 10 bytes, expected {_size(prepared, 3)}",
        "train/text/shard.00004.mds.zstd is missing",
        "validation/text/index.json is missing",
        "validation/text/lengths.npy is damaged",
    ]
    assert main([str(folder)]) == 1


def _size(folder: Path, shard: int) -> int:
    return read_manifest(folder).splits["train"]["text"].shards[shard].stored.bytes


@pytest.mark.parametrize("place", [0, 5, 0.1, 0.5, 0.9, -1])
@pytest.mark.parametrize("compressed", [False, True])
def test_any_flipped_bit_is_found(
    prepared: Path, prepared_raw: Path, tmp_path: Path, place: float, compressed: bool
) -> None:
    folder = copy_of(prepared if compressed else prepared_raw, tmp_path)
    for _, path in enumerate(sorted((folder / "train" / "text").iterdir())):
        flip(path, place, 3)
    assert len(problems(folder)) == len(list((folder / "train" / "text").iterdir()))


def test_a_flipped_bit_of_every_single_file_is_found_and_the_file_named(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {name for name, _ in read_manifest(folder).files()} == {*names} - {"manifest.json"}
    assert {"report.md", "report.png", "rejected.jsonl"} < {*names}
    for name in names:
        content = (folder / name).read_bytes()
        if not content:  # of rejected.jsonl
            (folder / name).write_bytes(b"x")
        else:
            flip(folder / name, 0.5)
        if name == "manifest.json":
            with pytest.raises(DataError, match=r"manifest\.json"):
                verify(str(folder), None, print)
        else:
            (found,) = problems(folder)
            assert found.startswith(f"{name} "), found
        (folder / name).write_bytes(content)
    assert problems(folder) == []


def test_files_and_folders_that_are_not_of_the_data_are_found(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(next(iter(sources.values())), tmp_path)
    manifest = read_manifest(folder)
    for split in manifest.splits:
        (folder / split / "text").rename(folder / split / "a.mds")
    splits = {split: {"a.mds": entries["text"]} for split, entries in manifest.splits.items()}
    write_manifest(folder, replace(manifest, splits=splits))
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "file").touch()
    (folder / "train" / ".DS_Store").touch()
    assert problems(folder) == []
    (folder / "train" / "newsrc").mkdir()
    (folder / "train" / "newsrc" / "index.json").touch()
    (folder / "empty" / "er").mkdir(parents=True)
    (folder / os.fsdecode(b"caf\xe9")).touch()
    (folder / "test").symlink_to(tmp_path)
    assert [text.partition(" is not in the manifest: remove it")[0] for text in problems(folder)] == [
        "caf\\xe9", "empty/er", "test", "train/newsrc/index.json",
    ]  # fmt: skip


def rewritten(folder: Path, change: Callable[[bytearray, ShardEntry], bytes]) -> None:
    """Change a raw shard, and write the new hashes into the manifest and the index: a tool that wrote wrong things."""
    manifest, path = read_manifest(folder), folder / SHARD
    entry = manifest.splits["train"]["text"]
    path.write_bytes(change(bytearray(path.read_bytes()), entry.shards[1]))
    shards = list(entry.shards)
    shards[1] = replace(shards[1], raw=describe_file(path))
    write_manifest(folder, _indexed(folder, manifest, replace(entry, shards=tuple(shards))))


def _indexed(folder: Path, manifest: Manifest, entry: SplitEntry) -> Manifest:
    index = folder / "train" / "text" / "index.json"
    data = json.loads(index.read_text())
    for shard, said in zip(data["shards"], entry.shards, strict=True):
        shard["raw_data"].update(bytes=said.raw.bytes, hashes={"xxh64": said.raw.xxh64})
    index.write_text(json.dumps(data))
    return with_entry(manifest, replace(entry, index=describe_file(index)))


def _first(data: bytearray) -> tuple[int, int]:
    """(begin, end) of the first sample."""
    begin, end = np.frombuffer(bytes(data[4:12]), "<u4").tolist()
    return begin, end


def _set(data: bytearray, place: int, value: bytes) -> bytes:
    data[place : place + len(value)] = value
    return bytes(data)


WRONG: dict[str, tuple[Callable[[bytearray, ShardEntry], bytes], str]] = {
    "number": (lambda data, shard: _set(data, 0, b"\1\0\0\0"), r"holds 1 documents, the manifest says \d+"),
    "offsets": (lambda data, shard: _set(data, 8, b"\xff\xff\xff\x7f"), "has offsets out of order or outside"),
    "columns": (
        lambda data, shard: bytes(data).replace(b'"tokens"', b'"tokenz"', 1),
        r"has columns .*'tokenz'.*, expected",
    ),
    "header": (lambda data, shard: _set(data, _first(data)[0], b"\1"), "document 0: its header contradicts the table"),
    "token": (lambda data, shard: _set(data, _first(data)[1] - 4, b"\xff\xff"), "document 0: token 65535, expected"),
    "end": (lambda data, shard: _set(data, _first(data)[1] - 2, b"\7\0"), "document 0: ends with token 7, expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_hashes_do_not_see_is_found(prepared_raw: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    change, message = WRONG[name]
    rewritten(folder, change)
    (found,) = problems(folder)
    assert found.startswith(f"{SHARD}: ")
    assert re.search(message, found), found


def test_counts_that_disagree_are_found(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = read_manifest(folder)
    entry = manifest.splits["train"]["text"]
    path = folder / "train" / "text" / "lengths.npy"
    lengths = np.load(path)
    lengths[0] += 1
    lengths[1] -= 1
    np.save(path, lengths)
    one, other, *rest = entry.shards
    shards = (replace(one, tokens=one.tokens + 3), replace(other, tokens=other.tokens - 3), *rest)
    write_manifest(folder, with_entry(manifest, replace(entry, lengths=describe_file(path), shards=shards)))
    assert problems(folder) == [
        f"train/text/shard.00000.mds.zstd: holds {one.tokens} tokens, the manifest says {one.tokens + 3}",
        "train/text/shard.00000.mds.zstd: document 0 and 1 more: "
        f"{lengths[0] - 1} tokens, lengths.npy says {lengths[0]}",
        f"{SHARD}.zstd: holds {other.tokens} tokens, the manifest says {other.tokens - 3}",
    ]


def test_a_compressed_shard_with_another_content_is_found(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest, path = read_manifest(folder), folder / f"{SHARD}.zstd"
    entry = manifest.splits["train"]["text"]
    path.write_bytes(zstandard.compress(b"other"))
    shards = list(entry.shards)
    shards[1] = replace(shards[1], compressed=describe_file(path))
    write_manifest(folder, with_entry(manifest, replace(entry, shards=tuple(shards))))
    index, shard = problems(folder)
    documents = entry.shards[1].documents
    assert index.startswith(f"train/text/index.json, shard 1: {documents} documents, shard.00001.mds of ")
    assert f"; the manifest says {documents} documents, shard.00001.mds of " in index and "FileEntry" not in index
    assert shard.startswith(f"{SHARD}.zstd, decompressed, has 5 bytes, xxh64") and "expected" in shard


def test_another_tokenizer_is_found(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, tokenizer=replace(manifest.tokenizer, sha256="0" * 64)))
    (found,) = problems(folder)
    assert found.startswith("tokenizer: ") and f"the manifest says {'0' * 64}" in found
    entry = FileEntry("tokenizer.json", 3, "0" * 16)
    write_manifest(folder, replace(manifest, tokenizer=replace(manifest.tokenizer, file=entry)))
    assert problems(folder) == ["tokenizer.json is missing"]


def test_text_bytes_that_are_not_those_of_the_byte_tokens_are_found(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = read_manifest(folder)
    entry = manifest.splits["train"]["text"]
    write_manifest(folder, with_entry(manifest, replace(entry, text_bytes=entry.text_bytes + 1)))
    assert problems(folder) == [
        f"train/text: {entry.text_bytes + 1} bytes of text in the manifest, its tokens are {entry.text_bytes} bytes"
    ]


@pytest.mark.parametrize("name", ["bytes", "documents", "vocabulary", "name"])
def test_a_manifest_with_a_text_for_a_number_is_refused(prepared: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = read_manifest(folder)
    entry: Any = manifest.splits["train"]["text"]
    if name == "vocabulary":
        changed: Any = replace(manifest, tokenizer=replace(manifest.tokenizer, vocabulary="257"))  # type: ignore[arg-type]
    elif name == "documents":
        changed = with_entry(manifest, replace(entry, documents="12"))
    else:
        changed = with_entry(
            manifest, replace(entry, index=replace(entry.index, **{name: "12" if name == "bytes" else 3}))
        )
    write_manifest(folder, changed)
    with pytest.raises(DataError, match=f"{name}.* is '?[0-9]+'?, expected a |not a complete|documents, the manifest"):
        verify(str(folder), None, print)


def test_a_report_that_cannot_be_written_is_told_before_the_work(prepared: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "x.json"):
        with pytest.raises(DataError, match="--json .*; name a file in a folder that is there"):
            main(["nowhere", "--json", str(place)])


def test_a_folder_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*manifest\.json .*; name a folder made by python -m data_prep"):
        main([str(tmp_path)])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a complete manifest"):
        main([str(tmp_path)])


@pytest.mark.parametrize("limit", [None, 30_000])
def test_a_remote_folder_is_verified_in_little_space(
    prepared: Path, prepared_raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    def look(name: str) -> tuple[str, ...]:
        report = verify(f"s3://{BUCKET}/{name}", Cache(tmp_path / "cache", limit), said.append, 2, QUICK)
        left: list[Any] = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
        assert left == [] and report.notes == ()
        return report.problems

    said: list[str] = []
    with s3_server() as server, proxy(server) as faults:
        set_environment(environment(faults.address), monkeypatch)
        upload(server, prepared, "good")
        upload(server, prepared_raw, "raw")
        assert look("good") == look("raw") == ()
        faults.set("flipped", count=1, match="shard.00001")
        assert look("good") == ()  # a fault of the transfer heals
        faults.set("none")
        client(server).delete_object(Bucket=BUCKET, Key=f"good/{SHARD}.zstd")
        client(server).put_object(Bucket=BUCKET, Key="good/train/text/shard.00002.mds.zstd", Body=b"other")
        client(server).put_object(Bucket=BUCKET, Key="good/train/text/shard.00099.mds.zstd", Body=b"more")
        client(server).put_object(Bucket=BUCKET, Key="good/train/new/.hidden", Body=b"more")
        client(server).put_object(Bucket=BUCKET, Key="good/train/new/index.json", Body=b"more")
        client(server).put_object(Bucket=BUCKET, Key="good/train/", Body=b"")
        strange, unknown, missing, other = look("good")
    assert strange.startswith("train/new/index.json is not in the manifest")
    assert "data.path" not in missing
    assert unknown.startswith("train/text/shard.00099.mds.zstd is not in the manifest")
    assert missing.startswith(f"{SHARD}.zstd: cannot fetch s3://{BUCKET}/good/{SHARD}.zstd (1 try,")
    assert other == f"train/text/shard.00002.mds.zstd has 5 bytes, expected {_size(prepared, 2)}"
