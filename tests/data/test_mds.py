"""Pieces of documents from files that mosaicml-streaming wrote."""

import os
from pathlib import Path

import numpy as np
import pytest

from titans_train.data.mds import MdsFile, check_offsets
from titans_train.data.shim import import_streaming

DTYPE = np.dtype("<u4")
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
    assert file.lengths(4).tolist() == [len(tokens) for tokens in DOCUMENTS]
    for index, tokens in enumerate(DOCUMENTS):
        assert file.name(index) == NAMES[index]
        assert file.length(index, 4) == len(tokens)
        for begin, end in ((0, len(tokens)), (len(tokens) // 2, len(tokens)), (0, 1)):
            found = file.tokens(index, begin, end, DTYPE, length=len(tokens))
            assert found.dtype == DTYPE and found.tolist() == tokens[begin:end].tolist()


def test_ranges_and_lengths_that_do_not_fit_are_refused(written: Path) -> None:
    file = MdsFile(written, 3)
    with pytest.raises(ValueError, match="tokens 990 to 1001 of document 1, which has 1000"):
        file.tokens(1, 990, 1001, DTYPE)
    with pytest.raises(ValueError, match="expected 999 tokens, found 1000"):
        file.tokens(1, 0, 10, DTYPE, length=999)


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
        MdsFile(written, 3).tokens(1, 0, 1, DTYPE)


def test_a_file_cut_while_it_is_open_is_an_error(written: Path) -> None:
    file = MdsFile(written, 3)
    assert file.unchanged()
    os.truncate(written, 300)
    assert not file.unchanged()
    with pytest.raises(ValueError, match=r"it ends at byte 300, expected \d+ or more"):
        file.tokens(1, 0, 1000, DTYPE)
    with pytest.raises(ValueError, match="its offsets are wrong"):
        MdsFile(written, 3)


def test_a_removed_file_can_still_be_read(written: Path) -> None:
    file = MdsFile(written, 3)
    assert file.is_at(written) and not file.removed()
    written.unlink()
    assert file.removed() and file.unchanged()
    assert file.tokens(2, 3, 5, DTYPE).tolist() == DOCUMENTS[2][3:5].tolist()
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
