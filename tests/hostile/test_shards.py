"""Files of prepared data that are as their manifest says, and hold what cannot be: bombs, pickles, devices, lies."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_prep.errors import PrepareError
from data_prep.manifest import TokenizerEntry, describe_file
from data_prep.tokenizer import load_prepared_tokenizer, load_tokenizer
from tests.data.corpus import prepare_folder
from tests.data.folders import copy_of, open_store, read_all, read_manifest, with_entry, write_manifest
from tests.hostile.refusals import DEEP, Bomb, little_memory, pickled, zipped
from titans_train.data import DataError
from titans_train.data.cache import Cache
from titans_train.data.lengths import read_lengths
from titans_train.data.mds import MdsFile
from titans_train.data.verify import verify

SHARD, LENGTHS = "train/text/shard.00000.mds", "train/text/lengths.npy"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw shards."""
    return prepare_folder(tmp_path_factory.mktemp("good"), compression="none")


@pytest.fixture(scope="module")
def zipped_good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("zipped"))


def told(folder: Path, name: str) -> None:
    """The manifest now states the file as it lies there: no hash shows what was done to it."""
    manifest = read_manifest(folder)
    entry, found = manifest.splits["train"]["text"], describe_file(folder / name)
    first, *rest = entry.shards
    if name == LENGTHS:
        entry = replace(entry, lengths=found)
    elif first.compressed is not None:
        entry = replace(entry, shards=(replace(first, compressed=found), *rest))
    else:
        entry = replace(entry, shards=(replace(first, raw=found), *rest))
    write_manifest(folder, with_entry(manifest, entry))


def refusals(folder: Path, work: Path) -> list[str]:
    """What the reader of training says, and all that verify-data finds."""
    with little_memory():
        with pytest.raises(DataError) as raised:
            read_all(open_store(folder, work))
        problems = verify(str(folder), Cache(work / "verify"), lambda line: None).problems
    assert problems
    return [str(raised.value), *problems]


def npy(values: object, **options: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(values), **options)  # type: ignore[arg-type]
    return stream.getvalue()


def head(shape: str, descr: str = "'<i8'") -> bytes:
    """The head of an .npy file that declares a shape."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


ARRAYS: dict[str, Callable[[Path, np.ndarray], bytes]] = {
    "a pickle": lambda mark, good: pickled(mark),
    "an array of pickles": lambda mark, good: npy(np.array([Bomb(mark)] * len(good), object), allow_pickle=True),
    "an archive": lambda mark, good: zipped(npy(good)),
    "float64": lambda mark, good: npy(good.astype(float)),
    "int32": lambda mark, good: npy(good.astype(np.int32)),
    "int8": lambda mark, good: npy(good.astype(np.int8)),
    "big-endian": lambda mark, good: npy(good.astype(">i8")),
    "booleans": lambda mark, good: npy(good > 0),
    "texts": lambda mark, good: npy(good.astype("U20")),
    "records": lambda mark, good: npy(np.zeros(len(good), "i4,i4")),
    "two dimensions": lambda mark, good: npy(good[:, None]),
    "no dimension": lambda mark, good: npy(good[0]),
    "negative": lambda mark, good: npy([*good[:-2], good[-2] + good[-1] + 5, -5]),
    "zero": lambda mark, good: npy([*good[:-2], good[-2] + good[-1], 0]),
    "sums that wrap around": lambda mark, good: npy([*good[:-2], 2**62, 2**62]),
    "one too few": lambda mark, good: npy(good[:-1]),
    "2^60 declared": lambda mark, good: head(f"({2**60},)"),
    "2^60 declared, of nothing": lambda mark, good: head(f"({2**60}, 0)"),
    "right, and cut": lambda mark, good: head(f"({len(good)},)"),
    "deep header": lambda mark, good: head("(" * 5_000),
    "code in the header": lambda mark, good: head(f"({len(good)},)", f"__import__('os').mkdir({str(mark)!r})"),
    "empty": lambda mark, good: b"",
}


@pytest.mark.parametrize("name", ARRAYS)
def test_lengths_that_are_no_lengths_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    folder, mark = copy_of(good, tmp_path), tmp_path / "mark"
    content = ARRAYS[name](mark, np.load(folder / LENGTHS))
    documents = len(np.load(folder / LENGTHS))
    with little_memory(), pytest.raises(ValueError):
        values = read_lengths(content, documents)
        raise ValueError(f"sum {int(values.sum())}") if int(values.max()) > 2**60 else AssertionError(values)
    (folder / LENGTHS).write_bytes(content)
    if len(content) > 128 + 8 * documents:
        return  # its size alone is refused: see test_manifests
    told(folder, LENGTHS)
    assert any("lengths.npy" in text or "hold" in text for text in refusals(folder, tmp_path))
    assert not mark.exists()


def words(path: Path, changes: dict[int, int]) -> None:
    data = bytearray(path.read_bytes())
    for place, value in changes.items():
        data[4 * place : 4 * place + 4] = value.to_bytes(4, "little")
    path.write_bytes(data)


SHARDS: dict[str, Callable[[Path, Path], object]] = {
    "2^32 - 1 samples": lambda path, mark: words(path, {0: 2**32 - 1}),
    "no sample": lambda path, mark: words(path, {0: 0}),
    "an offset beyond the end": lambda path, mark: words(path, {2: 2**32 - 1}),
    "an offset before the beginning": lambda path, mark: words(path, {1: 0}),
    "offsets backwards": lambda path, mark: words(path, {2: 4}),
    "a pickle": lambda path, mark: path.write_bytes(pickled(mark).ljust(path.stat().st_size, b".")),
    "an archive": lambda path, mark: path.write_bytes(zipped(pickled(mark)).ljust(path.stat().st_size, b"\0")),
    "zeros": lambda path, mark: path.write_bytes(bytes(path.stat().st_size)),
    "0xFF": lambda path, mark: path.write_bytes(b"\xff" * path.stat().st_size),
    "a name of 4 GiB": lambda path, mark: _header(path, 2**32 - 1, 1),
    "tokens of 4 GiB": lambda path, mark: _header(path, 1, 2**32 - 1),
    "half a token": lambda path, mark: _header(path, 1, None),
}


def _header(path: Path, name: int, tokens: int | None) -> None:
    """Of the first document. tokens None: one byte of the name becomes a byte of the tokens."""
    data = path.read_bytes()
    begin = int.from_bytes(data[4:8], "little")
    before = [int.from_bytes(data[begin + n : begin + n + 4], "little") for n in (0, 4)]
    after = (before[0] - 1, before[1] + 1) if tokens is None else (name, tokens)
    head = b"".join(value.to_bytes(4, "little") for value in after)
    path.write_bytes(data[:begin] + head + data[begin + 8 :])


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_are_no_shards_are_refused(name: str, good: Path, tmp_path: Path) -> None:
    folder, mark = copy_of(good, tmp_path), tmp_path / "mark"
    SHARDS[name](folder / SHARD, mark)
    told(folder, SHARD)
    if name == "half a token":  # rounds down to the tokens it should have: the reader takes those, verify tells
        problems = verify(str(folder), Cache(tmp_path / "verify"), lambda line: None).problems
        assert any("are no tokens" in text for text in problems)
        return
    assert all("shard.00000.mds" in text for text in refusals(folder, tmp_path)[:1])
    assert not mark.exists()


def test_a_file_that_has_no_table_of_so_many_documents_takes_no_memory(good: Path) -> None:
    with little_memory(), pytest.raises(ValueError, match="have no table of so many"):
        MdsFile(good / SHARD, 2**40)


BOMBS: dict[str, Callable[[], bytes]] = {
    "4 GiB of zeros": lambda: b"".join([zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))] * 64),
    "a frame that declares 2^62": lambda: b"\x28\xb5\x2f\xfd\xe0" + (2**62).to_bytes(8, "little") + b"\x01\x00\x00",
    "a window of 2 GiB": lambda: zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=31, hash_log=6, chain_log=6)
    ).compressobj().compress(b"x" * 100_000) + b"",
    "a million empty frames": lambda: zstandard.ZstdCompressor().compress(b"") * 1_000_000,
    "no frame": lambda: b"\x00" * 1000,
    "a skippable frame of 4 GiB": lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\xff" + bytes(100),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_writes_no_more_than_was_declared(
    name: str, zipped_good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(zipped_good, tmp_path)
    path = folder / f"{SHARD}.zstd"
    path.write_bytes(BOMBS[name]())
    told(folder, f"{SHARD}.zstd")
    largest: list[int] = []
    replaced = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.exists() and ".mds" in self.name:
            largest.append(self.stat().st_size)
        replaced(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert "shard.00000.mds" in refusals(folder, tmp_path)[0]
    assert largest or name != "4 GiB of zeros"
    assert max(largest, default=0) <= read_manifest(folder).splits["train"]["text"].shards[0].raw.bytes + (1 << 20)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "hole"])
@pytest.mark.parametrize("name", [SHARD, LENGTHS])
def test_devices_pipes_and_holes_in_place_of_files_are_refused(
    name: str, kind: str, good: Path, tmp_path: Path
) -> None:
    folder = copy_of(good, tmp_path)
    (folder / name).unlink()
    if kind == "device":
        (folder / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).touch()
        os.truncate(folder / name, 1 << 40)
    assert Path(name).name in refusals(folder, tmp_path)[0]


WORDS = b'{"model": {"type": "WordLevel", "vocab": {"</s>": %d}, "unk_token": "</s>"}}'
TOKENIZERS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "an archive": lambda mark: zipped(pickled(mark)),
    "deep lists": lambda mark: DEEP.encode(),
    "a deep tokenizer": lambda mark: b'{"normalizer": ' + b'{"type":"Sequence","normalizers":[' * 20_000,
    "NaN": lambda mark: b'{"version": NaN}',
    "not UTF-8": lambda mark: b"\xff" * 100,
    "empty": lambda mark: b"",
    "an id of 2^63": lambda mark: WORDS % 2**63,
    "a negative id": lambda mark: WORDS % -1,
    "no model": lambda mark: b'{"model": null}',
    "another model": lambda mark: b'{"model": {"type": "__import__", "vocab": []}}',
    "zeros": lambda mark: bytes(10_000),
}  # fmt: skip


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_file_that_is_none_is_refused(name: str, file: str, good: Path, tmp_path: Path) -> None:
    folder, mark = copy_of(good, tmp_path), tmp_path / "mark"
    (folder / file).write_bytes(TOKENIZERS[name](mark))
    kind = "huggingface" if file.endswith("json") else "sentencepiece"
    entry = TokenizerEntry(kind, "0" * 64, 257, 256, describe_file(folder / file))
    write_manifest(folder, replace(read_manifest(folder), tokenizer=entry))
    with little_memory():
        with pytest.raises(PrepareError, match=file):
            load_tokenizer(str(folder / file))
        with pytest.raises(PrepareError, match=file):
            load_prepared_tokenizer(folder)
        problems = verify(str(folder), Cache(tmp_path / "verify"), lambda line: None).problems
    assert any(file in text for text in problems)
    assert not mark.exists()
