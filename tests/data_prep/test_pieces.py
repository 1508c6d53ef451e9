import io
import random

import pytest

from data_prep.pieces import HEAD_BYTES, READ_BYTES, pieces, start_of

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
