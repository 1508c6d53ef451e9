"""Pieces of documents from files that mosaicml-streaming wrote."""

import os
from pathlib import Path

import numpy as np
import pytest

from titans_train.data import mds
from titans_train.data.mds import MdsFile, check_offsets
from titans_train.data.shim import import_streaming

DTYPE = np.dtype("<u4")


def tokens(file: MdsFile, index: int, begin: int, end: int) -> list[int]:
    """Tokens [begin, end) of a document of DOCUMENTS."""
    out = np.empty(end - begin, DTYPE)
    file.read_into(index, (len(DOCUMENTS[index]) - begin) * DTYPE.itemsize, out.data.cast("B"))
    return out.tolist()


NAMES = ["one.txt", "", "größe/drei.txt"]
DOCUMENTS = [np.arange(size, dtype=DTYPE) * 70_001 + size for size in (1, 1000, 17)]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    columns = {"name": "str", "tokens": "bytes"}
    with import_streaming("streaming").MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        for name, tokens in zip(NAMES, DOCUMENTS, strict=True):
            writer.write({"name": name, "tokens": tokens.tobytes()})
    return tmp_path / "mds" / "shard.00000.mds"


def test_pieces_are_what_was_written(written: Path) -> None:
    file = MdsFile(written, 3)
    assert file.lengths(4).tolist() == [len(expected) for expected in DOCUMENTS]
    for index, expected in enumerate(DOCUMENTS):
        assert file.name(index) == NAMES[index]
        size = len(expected)
        for begin, end in ((0, size), (size // 2, size), (0, 1), (size // 3, size // 2)):
            assert tokens(file, index, begin, end) == expected[begin:end].tolist()


def test_more_tokens_than_there_are_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="it has 7 bytes, 40 of tokens expected|it has 11 bytes, 40 of tokens"):
        MdsFile(written, 3).read_into(0, 40, memoryview(bytearray(40)))


@pytest.mark.parametrize("small", [0, 1 << 20])
@pytest.mark.parametrize("window", [8, 9, 1000, 1 << 20])
def test_lengths_are_read_from_headers_one_by_one_or_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, window: int
) -> None:
    sizes = np.random.default_rng(0).integers(0, 300, 500)
    names = [b"n" * int(size % 7) for size in sizes]
    table = 4 * 502 + np.cumsum([0, *(8 + len(name) + 4 * size for name, size in zip(names, sizes, strict=True))])
    samples = [
        np.array([len(name), 4 * size], "<u4").tobytes() + name + bytes(range(256)) * 5
        for name, size in zip(names, sizes, strict=True)
    ]
    cut = [sample[:size] for sample, size in zip(samples, np.diff(table), strict=True)]
    path = tmp_path / "shard.mds"
    path.write_bytes(np.array([500, *table], "<u4").tobytes() + b"".join(cut))
    monkeypatch.setattr(mds, "_SMALL_BYTES", small)
    monkeypatch.setattr(mds, "_WINDOW_BYTES", window)
    assert MdsFile(path, 500).lengths(4).tolist() == sizes.tolist()


@pytest.mark.parametrize("documents", [2, 4])
def test_another_number_of_documents_is_refused(written: Path, documents: int) -> None:
    with pytest.raises(ValueError, match=f"expected {documents} documents, its table says 3"):
        MdsFile(written, documents)


def test_a_header_that_contradicts_the_table_is_refused(written: Path) -> None:
    data = bytearray(written.read_bytes())
    place = int(np.frombuffer(data, "<u4", 5)[2])
    data[place + 4] ^= 1
    written.write_bytes(data)
    with pytest.raises(ValueError, match="document 1 says 0 \\+ 4001 bytes, the table 4000 in all"):
        MdsFile(written, 3).lengths(4)


def test_a_file_cut_while_it_is_open_is_an_error(written: Path) -> None:
    file = MdsFile(written, 3)
    assert file.unchanged()
    os.truncate(written, 300)
    assert not file.unchanged()
    with pytest.raises(ValueError, match=r"it ends at byte 300, expected \d+ or more"):
        tokens(file, 1, 0, 1000)
    with pytest.raises(ValueError, match="its offsets are wrong"):
        MdsFile(written, 3)


def test_a_removed_file_can_still_be_read(written: Path) -> None:
    file = MdsFile(written, 3)
    assert file.is_at(written) and not file.removed()
    written.unlink()
    assert file.removed() and file.unchanged()
    assert tokens(file, 2, 3, 5) == DOCUMENTS[2][3:5].tolist()
    with pytest.raises(FileNotFoundError):
        MdsFile(written, 3)


def test_a_written_file_whose_times_are_put_back_has_changed(written: Path) -> None:
    file, before = MdsFile(written, 3), written.stat()
    with written.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"x")
    os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not file.unchanged() and not file.is_at(written)


def test_a_file_is_closed_with_its_last_reference(written: Path) -> None:
    def descriptors() -> int:
        return sum(os.path.realpath(path) == str(written) for path in Path("/proc/self/fd").iterdir())

    file = MdsFile(written, 3)
    assert descriptors() == 1
    del file
    assert descriptors() == 0


@pytest.mark.parametrize("offsets", [[], [12, 20, 30], [20, 19, 40], [20, 25, 40], [20, 28, 41]])
def test_offsets_out_of_order_or_bounds_are_seen(offsets: list[int]) -> None:
    assert not check_offsets(np.array(offsets, np.uint32), 40)
    assert check_offsets(np.array([20, 28, 40], np.uint32), 40)
