"""Whatever happens to a shard, the run ends with an error that names it, or reads the right tokens."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.manifest import FILE_NAME
from tests.data.corpus import run_config
from titans_train.data import DataError, open_dataset

RAW, COMPRESSED = "shard.00001.mds", "shard.00001.mds.zstd"


def read_all(path: Path, runs: Path) -> list[list[int]]:
    dataset = open_dataset(run_config(path, runs, shuffle=False))
    return [dataset.sequence(number).tokens.tolist() for number in range(dataset.sequences_total)]


def copy_of(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "damaged"))


def flip(path: Path, place: float, bit: int = 0) -> None:
    """Flip one bit: at a byte offset (int; negative from the end) or a share of the file (float)."""
    data = bytearray(path.read_bytes())
    offset = int(place * len(data)) if isinstance(place, float) else place
    data[offset] ^= 1 << bit
    path.write_bytes(data)


# The number of samples, the table of offsets, the format description, sample headers, tokens, the last byte.
@pytest.mark.parametrize("place", [0, 3, 9, 21, 90, 150, 0.1, 0.25, 0.5, 0.75, 0.9, -2, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_raw_shard_is_caught(prepared_raw: Path, tmp_path: Path, place: float, bit: int) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    flip(folder / "train" / "text" / RAW, place, bit)
    with pytest.raises(DataError, match=rf"{RAW} is damaged: xxh64 \w+, expected \w+; copy the file again"):
        read_all(folder, tmp_path)


# The magic number, the frame header, blocks, the last byte.
@pytest.mark.parametrize("place", [0, 3, 4, 5, 8, 12, 0.1, 0.25, 0.5, 0.75, 0.9, -4, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_a_compressed_shard_is_caught(prepared: Path, tmp_path: Path, place: float, bit: int) -> None:
    folder = copy_of(prepared, tmp_path)
    flip(folder / "train" / "text" / COMPRESSED, place, bit)
    with pytest.raises(DataError, match=rf"{COMPRESSED} is damaged: xxh64 \w+, expected \w+; copy the file again"):
        read_all(folder, tmp_path)


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
        read_all(folder, tmp_path)


@pytest.mark.parametrize("name", [RAW, COMPRESSED])
def test_two_swapped_shards_are_caught(prepared: Path, prepared_raw: Path, tmp_path: Path, name: str) -> None:
    folder = copy_of(prepared_raw if name == RAW else prepared, tmp_path)
    one, other = folder / "train" / "text" / name, folder / "train" / name.replace("1", "2")
    os.rename(one, folder / "aside")
    os.rename(other, one)
    os.rename(folder / "aside", other)
    with pytest.raises(DataError, match=r"shard\.0000[12]\.mds.*(expected|damaged)"):
        read_all(folder, tmp_path)


def test_a_shard_damaged_after_it_was_checked_is_caught_by_the_next_run(prepared_raw: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    read_all(folder, tmp_path)
    shard = folder / "train" / "text" / RAW
    before = shard.stat()
    flip(shard, 0.5)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and modification time tell nothing
    with pytest.raises(DataError, match=f"{RAW} is damaged"):
        read_all(folder, tmp_path)


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_copy_in_the_cache_is_made_anew(prepared: Path, tmp_path: Path, cut: bool) -> None:
    expected = read_all(prepared, tmp_path)
    (cached,) = tmp_path.glob(f"test/cache/*/train/text/{RAW}")
    os.truncate(cached, 100) if cut else flip(cached, 0.5)
    assert read_all(prepared, tmp_path) == expected


def test_a_shard_cut_while_the_run_reads_it_is_caught(prepared_raw: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared_raw, tmp_path)
    dataset = open_dataset(run_config(folder, tmp_path, shuffle=False))
    dataset.sequence(0)
    os.truncate(folder / "train" / "text" / "shard.00000.mds", 5000)
    with pytest.raises(DataError, match=r"shard train/text/shard\.00000\.mds"):
        for number in range(dataset.sequences_total):
            dataset.sequence(number)


def test_compressed_and_raw_shards_hold_the_same_tokens(prepared: Path, prepared_raw: Path, tmp_path: Path) -> None:
    assert read_all(prepared, tmp_path) == read_all(prepared_raw, tmp_path)
    assert len(list((prepared / "train" / "text").glob("shard.*.zstd"))) > 4


def test_a_checked_shard_is_not_hashed_again(prepared: Path, tmp_path: Path) -> None:
    read_all(prepared, tmp_path)
    markers = {path: path.stat().st_mtime_ns for path in tmp_path.glob("test/cache/*/train/text/*.checked")}
    assert len(markers) > 5
    read_all(prepared, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in markers} == markers


def test_the_prepared_folder_is_left_as_it_was(prepared: Path, prepared_raw: Path, tmp_path: Path) -> None:
    for folder in (prepared, prepared_raw):
        before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))
        read_all(folder, tmp_path)
        assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


def test_damaged_document_lengths_are_caught(prepared: Path, tmp_path: Path) -> None:
    folder = copy_of(prepared, tmp_path)
    flip(folder / "train" / "text" / "lengths.npy", -8)
    with pytest.raises(DataError, match=r"lengths\.npy is damaged"):
        read_all(folder, tmp_path)


@pytest.mark.parametrize(("old", "new", "message"), [
    ('"documents": ', '"documents": 1', "the shards of train/text hold"),
    ('"version": 2', '"version": 3', "manifest version 3, this code reads 2"),
    ("{", "", "not a complete manifest"),
])  # fmt: skip
def test_a_damaged_manifest_is_caught(prepared: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = copy_of(prepared, tmp_path)
    manifest = folder / FILE_NAME
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=message):
        read_all(folder, tmp_path)
