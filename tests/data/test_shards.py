"""Whatever happens to a shard, reading ends with an error that names it, or gives the right tokens."""

import errno
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.manifest import FILE_NAME, Manifest, describe_file
from tests.data.folders import (
    copy_of,
    flip,
    many_shards,
    merged,
    open_store,
    read_all,
    read_manifest,
    texts_by_name,
    with_entry,
    write_manifest,
)
from titans_train.data.errors import DataError
from titans_train.data.opened import LARGEST

RAW, COMPRESSED = "shard.00001.mds", "shard.00001.mds.zstd"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_are_the_texts_that_were_prepared(
    prepared: Path, prepared_raw: Path, tmp_path: Path, split: str
) -> None:
    for folder in (prepared, prepared_raw):
        store = open_store(folder, tmp_path, split)
        expected = texts_by_name(store, folder.parent)
        assert read_all(store) == expected
        assert store.lengths().tolist() == [len(text) for text in expected]
        assert store.documents == len(expected) == int(store.documents_per_shard.sum()) > 10
        assert store.tokens_total == sum(map(len, expected)) == store.text_bytes + store.documents
        assert store.sources == ("text",)


def test_a_piece_of_a_document_is_that_piece(prepared: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    for number, text in enumerate(texts_by_name(store, prepared.parent)):
        for begin, end in ((0, 1), (len(text) - 1, len(text)), (len(text) // 3, len(text) // 2 + 1)):
            assert store.tokens(number, begin, end).tolist() == text[begin:end]
    assert store.tokens(number, 1, 1).tolist() == []
    for begin, end in ((-1, 1), (3, 2), (0, len(text) + 1)):
        with pytest.raises(
            DataError, match=rf"shard {prepared}/train/text/shard.*tokens {begin} to {end} of {len(text)}"
        ):
            store.tokens(number, begin, end)
    with pytest.raises(DataError, match=rf"document {store.documents} of .*, which has {store.documents}"):
        store.tokens(store.documents, 0, 1)


def test_sources_follow_each_other_in_sorted_order(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = merged(sources, tmp_path / "merged")
    store = open_store(folder, tmp_path)
    assert store.sources == ("books", "code", "web")
    single = {name: open_store(path, tmp_path) for name, path in sources.items()}
    assert read_all(store) == [text for name in store.sources for text in read_all(single[name])]
    chosen = open_store(folder, tmp_path, source="code")
    assert chosen.sources == ("code",) and read_all(chosen) == read_all(single["code"])
    assert store.documents_per_shard.tolist() == [
        count for name in store.sources for count in single[name].documents_per_shard.tolist()
    ]
    assert store.tokens_total == sum(one.tokens_total for one in single.values())
    prints = {store.fingerprint, *(open_store(folder, tmp_path, source=name).fingerprint for name in store.sources)}
    assert len(prints) == 4
    with pytest.raises(DataError, match=r"no source 'wiki'; it has books, code, web"):
        open_store(folder, tmp_path, source="wiki")


# The number of samples, the table of offsets, the format description, sample headers, tokens, the last byte.
@pytest.mark.parametrize("place", [0, 3, 9, 21, 90, 150, 0.1, 0.25, 0.5, 0.75, 0.9, -2, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_raw_shard_is_caught(prepared_raw: Path, tmp_path: Path, place: float, bit: int) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    flip(folder / "train" / "text" / RAW, place, bit)
    with pytest.raises(DataError, match=rf"{RAW} is damaged: xxh64 \w+, expected \w+; copy the file again"):
        read_all(open_store(folder, tmp_path))


# The magic number, the frame header, blocks, the last byte.
@pytest.mark.parametrize("place", [0, 3, 4, 5, 8, 12, 0.1, 0.25, 0.5, 0.75, 0.9, -4, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_compressed_shard_is_caught(prepared: Path, tmp_path: Path, place: float, bit: int) -> None:
    folder = copy_of(prepared, tmp_path)
    flip(folder / "train" / "text" / COMPRESSED, place, bit)
    with pytest.raises(DataError, match=rf"{COMPRESSED} is damaged: xxh64 \w+, expected \w+; copy the file again"):
        read_all(open_store(folder, tmp_path))


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated by a byte": (lambda path, other: os.truncate(path, path.stat().st_size - 1), r"has \d+ bytes, expected"),
    "truncated to half": (lambda path, other: os.truncate(path, path.stat().st_size // 2), r"has \d+ bytes, expected"),
    "empty": (lambda path, other: os.truncate(path, 0), r"has 0 bytes, expected \d+"),
    "longer by a byte": (lambda path, other: path.write_bytes(path.read_bytes() + b"\0"), r"has \d+ bytes, expected"),
    "missing": (lambda path, other: path.unlink(), "is missing"),
    "replaced by another": (lambda path, other: shutil.copyfile(other, path), r"(has \d+ bytes|is damaged)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [RAW, COMPRESSED])
def test_a_shard_cut_lost_or_replaced_is_caught(
    prepared: Path, prepared_raw: Path, tmp_path: Path, damage: str, name: str
) -> None:
    folder = copy_of(prepared_raw if name == RAW else prepared, tmp_path)
    shard = folder / "train" / "text" / name
    do, message = DAMAGE[damage]
    do(shard, shard.with_name(name.replace("1", "2")))
    with pytest.raises(DataError, match=rf"{name} {message}"):
        read_all(open_store(folder, tmp_path))


@pytest.mark.parametrize("name", [RAW, COMPRESSED])
def test_two_swapped_shards_are_caught(prepared: Path, prepared_raw: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(prepared_raw if name == RAW else prepared, tmp_path)
    one, other = (folder / "train" / "text" / each for each in (name, name.replace("1", "2")))
    os.rename(one, folder / "aside")
    os.rename(other, one)
    os.rename(folder / "aside", other)
    with pytest.raises(DataError, match=r"shard\.0000[12]\.mds.*(expected|damaged)"):
        read_all(open_store(folder, tmp_path))


def test_missing_shards_are_refused_at_once(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    for number in (1, 3):
        (folder / "train" / "text" / f"shard.0000{number}.mds.zstd").unlink()
    with pytest.raises(DataError, match=rf"{COMPRESSED} and 1 more shards is missing; copy the file again"):
        open_store(folder, tmp_path)


def test_a_shard_damaged_after_it_was_checked_is_caught_by_the_next_run(prepared_raw: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    time.sleep(0.2)  # a file that has just been written is not remembered
    reading = open_store(folder, tmp_path)
    read_all(reading)
    assert len(list((tmp_path / "cache").glob("*/*/train/text/shard*.checked"))) > 4
    shard = folder / "train" / "text" / RAW
    before = shard.stat()
    flip(shard, 0.5)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and modification time tell nothing
    fresh = open_store(folder, tmp_path / ".." / tmp_path.name)  # as of another process: no file is open yet
    for store in (reading, fresh):
        with pytest.raises(DataError, match=f"{RAW} is damaged"):
            read_all(store)


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_copy_in_the_cache_is_made_anew(prepared: Path, tmp_path: Path, cut: bool) -> None:
    expected = read_all(open_store(prepared, tmp_path))
    (cached,) = tmp_path.glob(f"cache/*/*/train/text/{RAW}")
    os.truncate(cached, 100) if cut else flip(cached, 0.5)
    assert read_all(open_store(prepared, tmp_path)) == expected


@pytest.mark.parametrize("cut", [False, True])
def test_a_shard_damaged_while_it_is_read_is_caught(prepared_raw: Path, tmp_path: Path, cut: bool) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    store = open_store(folder, tmp_path)
    store.tokens(0, 0, 1)
    shard = folder / "train" / "text" / "shard.00000.mds"
    os.truncate(shard, 5000) if cut else flip(shard, 0.9)
    with pytest.raises(DataError, match=r"train/text/shard\.00000\.mds (has 5000 bytes|is damaged)"):
        store.tokens(0, 0, 1)


def test_a_checked_shard_is_not_hashed_again(prepared: Path, tmp_path: Path) -> None:
    read_all(open_store(prepared, tmp_path))
    markers = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*/train/text/*.checked")}
    assert len(markers) > 5
    read_all(open_store(prepared, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in markers} == markers


def test_the_prepared_folder_is_left_as_it_was(prepared: Path, prepared_raw: Path, tmp_path: Path) -> None:
    for folder in (prepared, prepared_raw):
        before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))
        read_all(open_store(folder, tmp_path))
        assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_damaged_document_lengths_are_caught(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    flip(folder / "train" / "text" / "lengths.npy", -8)
    with pytest.raises(DataError, match=r"lengths\.npy is damaged"):
        open_store(folder, tmp_path).lengths()


def test_lengths_damaged_or_cut_while_they_are_used_change_nothing(prepared: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    lengths = store.lengths()
    before = lengths.tolist()
    (cached,) = tmp_path.glob("cache/*/*/train/text/lengths.npy")
    flip(cached, -8)
    assert store.lengths().tolist() == lengths.tolist() == before
    os.truncate(cached, 0)
    assert store.lengths().tolist() == before
    assert read_all(open_store(prepared, tmp_path)) == read_all(store)  # made anew


def test_lengths_that_change_between_check_and_use_are_checked_again(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, read, changes = open_store(prepared, tmp_path).lengths().tolist(), Path.read_bytes, [1] * 3

    def changed(path: Path) -> bytes:
        content = read(path)
        return content[:-1] + b"\7" if path.name == "lengths.npy" and changes and changes.pop() else content

    monkeypatch.setattr(Path, "read_bytes", changed)
    assert open_store(prepared, tmp_path).lengths().tolist() == expected and not changes
    changes[:] = [1] * 100
    with pytest.raises(DataError, match=rf"^{prepared}/train/text/lengths.npy: its copy in the cache is changed again"):
        open_store(prepared, tmp_path).lengths()


def test_a_folder_that_cannot_be_read_is_an_error_with_a_remedy(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refused)
    with pytest.raises(
        DataError,
        match=rf"cannot read {prepared}/train/text \(Permission denied\); give this user read .* set data.path",
    ):
        open_store(prepared, tmp_path)


def test_lengths_that_are_not_those_of_the_shards_are_caught(prepared: Path, tmp_path: Path) -> None:
    """A folder whose every file is as its manifest says, and that is wrong all the same."""
    folder = copy_of(prepared, tmp_path)
    path, manifest = folder / "train" / "text" / "lengths.npy", read_manifest(folder)
    lengths = np.load(path)
    np.save(path, lengths[[1, 0, *range(2, len(lengths))]])
    write_manifest(folder, with_entry(manifest, replace(manifest.splits["train"]["text"], lengths=describe_file(path))))
    with pytest.raises(
        DataError,
        match=rf"shard {folder}/train/text/shard.00000.mds, document 0: expected {lengths[1]} .*, found {lengths[0]};",
    ):
        open_store(folder, tmp_path).tokens(0, 0, 1)


@pytest.mark.parametrize(("change", "message"), [
    ({"vocabulary": 256}, r"^shard /.*/train/text/shard\.\d+\.mds, document \d+: token 256, expected below 256"),
    ({"end_of_document": 7}, r"^shard /.*/train/text/shard\.\d+\.mds, document 0: its last token is 256, expected 7"),
])  # fmt: skip
def test_tokens_that_the_tokenizer_cannot_give_are_caught(
    prepared: Path, tmp_path: Path, change: dict[str, int], message: str
) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, tokenizer=replace(manifest.tokenizer, **change)))
    with pytest.raises(DataError, match=message):
        read_all(open_store(folder, tmp_path))


@pytest.mark.parametrize(("old", "new", "message"), [
    ('\n    "tokens": ', '\n    "tokens": 1', r"damaged or was changed: xxh64 \w+, expected \w+; copy it again"),
    ('"version": 2', '"version": 3', "manifest version 3, this code reads 2"),
    ("{", "", "not a complete manifest"),
])  # fmt: skip
def test_a_damaged_manifest_is_caught(prepared: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = folder / FILE_NAME
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        open_store(folder, tmp_path)


def test_every_flipped_bit_of_a_manifest_is_caught(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    content = (folder / FILE_NAME).read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / FILE_NAME).write_bytes(changed)
        with pytest.raises(DataError, match=r"manifest"):
            open_store(folder, tmp_path)


def test_a_manifest_that_contradicts_itself_is_refused(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = Manifest.from_text((folder / FILE_NAME).read_text(), "here")
    entry = manifest.splits["train"]["text"]
    write_manifest(folder, with_entry(manifest, replace(entry, tokens=entry.tokens + 1)))
    with pytest.raises(DataError, match="the shards of train/text hold"):
        open_store(folder, tmp_path)


def test_a_folder_that_was_not_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json.*set data\.path to a folder made by python -m data_prep"):
        open_store(tmp_path / "nothing", tmp_path)


def test_a_store_sent_to_another_process_takes_no_lengths_along(prepared: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    expected = read_all(store)
    content = pickle.dumps(store)
    assert len(content) < 8000 and read_all(pickle.loads(content)) == expected


def test_a_thousand_shards_open_fast_with_few_descriptors(prepared_raw: Path, tmp_path: Path) -> None:
    folder = many_shards(prepared_raw, tmp_path / "many", 1000)
    before = len(os.listdir("/proc/self/fd"))  # other tests of this process have theirs
    started = time.monotonic()
    store = open_store(folder, tmp_path)
    store.lengths()
    assert time.monotonic() - started < 1
    first = np.cumsum(store.documents_per_shard) - store.documents_per_shard
    for document in first[:150].tolist():
        store.tokens(document, 0, 1)
    assert len(os.listdir("/proc/self/fd")) - before <= LARGEST
    shards = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(re.search(r"shard\.\d+\.mds$", name) is not None for name in shards) <= LARGEST


def test_what_the_cache_must_hold_is_known(prepared: Path, prepared_raw: Path, tmp_path: Path) -> None:
    store = open_store(prepared, tmp_path)
    sizes = sorted(entry.raw.bytes for entry in read_manifest(prepared).splits["train"]["text"].shards)
    assert store.largest_shards(2) == sizes[-1] + sizes[-2]
    assert store.largest_shards(1000) == sum(sizes)
    assert open_store(prepared_raw, tmp_path).largest_shards(5) == 0  # read in place
