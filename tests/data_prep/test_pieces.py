import gzip
import io
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import IO

import pytest
import zstandard

from data_prep.pieces import (
    HEAD_BYTES,
    READ_BYTES,
    DamagedFile,
    Unpacked,
    gunzip,
    pieces,
    start_of,
    unzstd,
)

Unpack = Callable[[IO[bytes]], Iterator[bytes]]

FILES = {
    "lines": (b"\n", b"one\n\ntwo\r\n\xc3\xa4\xe2\x82\xac\n\n\nlast"),
    "a final newline": (b"\n", b"one\ntwo\n"),
    "only newlines": (b"\n", b"\n\n"),
    "nothing": (b"\n", b""),
    "separated": (b"<|end|>", b"one<|end|>\ntwo<|end|><|end|>three<|en<|end|>d|><|end|>\n"),
    "a separator first": (b"<|end|>", b"<|end|>one<|end|>"),
    "a separator of many bytes": ("—ä—".encode(), "eins—ä—ä—zwei—ä——ä—".encode()),
    "a separator that overlaps itself": (b"\n\n", b"a\n\n\nb\n\n\n\nc\n\n"),
}


def cut(content: bytes, separator: bytes, begin: int = 0, end: int | None = None, limit: int = 100) -> list[bytes]:
    stream = io.BytesIO(content)
    position = stream.seek(start_of(begin, separator))
    found = list(pieces(stream.read, separator, limit, position, begin, end))
    assert all(begin <= piece.begin < (len(content) if end is None else end) for piece in found)
    return [bytes(piece.data) for piece in found]


@pytest.mark.parametrize("case", FILES)
def test_ranges_of_every_size_give_each_piece_exactly_once(case: str) -> None:
    separator, content = FILES[case]
    whole = cut(content, separator)
    for size in range(1, len(content) + 2):
        ranges = [(begin, min(begin + size, len(content))) for begin in range(0, len(content), size)]
        assert [piece for begin, end in ranges for piece in cut(content, separator, begin, end)] == whole, size


@pytest.mark.parametrize("case", ["lines", "separated", "a separator first"])
def test_a_whole_file_is_cut_as_by_split(case: str) -> None:
    separator, content = FILES[case]
    expected = content.split(separator)
    assert cut(content, separator) == (expected if expected[-1] else expected[:-1])


def test_random_files_of_few_letters_are_cut_alike_in_all_ranges() -> None:
    random_numbers = random.Random(0)
    for _ in range(300):
        content = bytes(random_numbers.choices(b"ab", k=random_numbers.randrange(20)))
        separator = bytes(random_numbers.choices(b"ab", k=random_numbers.randrange(1, 5)))
        size = random_numbers.randrange(1, 8)
        parts = [cut(content, separator, at, min(at + size, len(content))) for at in range(0, len(content), size)]
        assert sum(parts, []) == cut(content, separator), (content, separator, size)


def test_a_piece_beyond_the_limit_is_told_but_not_held() -> None:
    long = b"x" * (3 * READ_BYTES)
    stream = io.BytesIO(b"one\n" + long + b"\ntwo\n")
    found = list(pieces(stream.read, b"\n", limit=1000))
    assert [(piece.begin, len(piece.data), piece.too_long) for piece in found] == [
        (0, 3, False),
        (4, HEAD_BYTES, True),
        (5 + len(long), 3, False),
    ]


@pytest.mark.parametrize("size", [99, 100, 101, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1])
@pytest.mark.parametrize("tail", [b"", b"<>", b"<>b"])
def test_the_limit_is_exact_wherever_the_reads_end(size: int, tail: bytes) -> None:
    first = next(pieces(io.BytesIO(b"a" * size + tail).read, b"<>", limit=100))
    assert first.too_long == (size > 100) and first.last == (tail == b"")


def test_a_read_that_ends_inside_a_separator_is_no_border() -> None:
    for shift in range(-8, 9):
        content = b"a" * (READ_BYTES + shift) + b"<|end|>" + b"b" * 10
        assert cut(content, b"<|end|>", limit=READ_BYTES * 2) == content.split(b"<|end|>"), shift


WORDS = b"".join(b"%d %d\n" % (n, n * n * 7919 % 104729) for n in range(60_000))


def packed_zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)


def streamed_zstd(content: bytes) -> bytes:
    """Without its size in the header, in several threads, with a long window."""
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, enable_ldm=True, threads=2)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(content) + packer.flush()


def unpacked(unpack: Unpack, data: bytes) -> tuple[bytes, str]:
    """What came before the fault, and the fault."""
    stream, found = Unpacked(unpack(io.BytesIO(data))), []
    try:
        while block := stream.read(1 << 20):
            found.append(block)
    except DamagedFile as error:
        return b"".join(found), str(error)
    return b"".join(found), ""


@pytest.mark.parametrize(("pack", "unpack"), [(gzip.compress, gunzip), (packed_zstd, unzstd), (streamed_zstd, unzstd)])
def test_whatever_comes_before_the_damage_is_unpacked(pack: Callable[[bytes], bytes], unpack: Unpack) -> None:
    whole = pack(WORDS)
    assert unpacked(unpack, whole) == (WORDS, "")
    assert unpacked(unpack, pack(b"a") + pack(b"") + whole) == (b"a" + WORDS, "")
    assert Unpacked(unpack(io.BytesIO(whole))).read() == WORDS
    for size in (0, 1, 5, 15, len(whole) // 2, len(whole) - 1):
        content, fault = unpacked(unpack, whole[:size])
        assert WORDS.startswith(content) and fault == "the file ends in the middle", size
        # gzip gives all, zstd whole blocks of 128 KiB
        assert len(content) / len(WORDS) >= size / len(whole) - (0.02 if unpack is gunzip else 0.35), size
    begun, fault = unpacked(unpack, pack(b"begin") + b"garbage behind it")
    assert begun == b"begin" and fault in ("gzip: incorrect header check", "no zstd frame begins here")


@pytest.mark.parametrize(("pack", "unpack"), [(gzip.compress, gunzip), (packed_zstd, unzstd)])
def test_a_fault_in_the_middle_costs_what_comes_after_it(pack: Callable[[bytes], bytes], unpack: Unpack) -> None:
    whole = bytearray(pack(WORDS))
    middle = len(whole) // 2
    for place in range(middle, middle + 100):
        whole[place] ^= 0xA5
    content, fault = unpacked(unpack, bytes(whole))
    same = len(os.path.commonprefix([content, WORDS]))
    assert fault and same > (0.45 if unpack is gunzip else 0.15) * len(WORDS)


def test_zeros_behind_gzip_and_skippable_frames_of_zstd_are_passed_over() -> None:
    two = gzip.compress(b"a") + bytes(70_000) + gzip.compress(b"b") + b"\0"
    assert unpacked(gunzip, two) == (b"ab", "")
    skipped = b"\x53\x2a\x4d\x18\x05\0\0\0other"
    assert unpacked(unzstd, skipped + packed_zstd(b"a") + skipped) == (b"a", "")
    assert unpacked(unzstd, skipped[:-1]) == (b"", "the file ends in the middle")


@pytest.mark.parametrize(("pack", "unpack"), [(gzip.compress, gunzip), (packed_zstd, unzstd)])
def test_memory_does_not_grow_with_what_a_file_unpacks_to(pack: Callable[[bytes], bytes], unpack: Unpack) -> None:
    data = pack(bytes(50_000_000))
    tracemalloc.start()
    stream, size = Unpacked(unpack(io.BytesIO(data))), 0
    while block := stream.read(1 << 20):
        size += len(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == 50_000_000 and peak < 8 << 20
