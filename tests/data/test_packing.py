from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from titans_train.data.packing import EpochPacking, Layout, Pieces

LENGTHS = np.array([5, 64, 65, 1, 200, 128, 7, 31])
ORDER = np.array([4, 0, 7, 2, 1, 6, 3, 5])
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 1000, size=n) for n in LENGTHS]


def each(pieces: Pieces) -> list[SimpleNamespace]:
    columns = {field.name: getattr(pieces, field.name).tolist() for field in fields(pieces)}
    rows = zip(*columns.values(), strict=True)
    return [SimpleNamespace(**dict(zip(columns, values, strict=True))) for values in rows]


def test_concatenated_windows_are_the_joined_stream_and_overlap_by_the_label() -> None:
    layout = Layout(length=50, isolate=False)
    packing = EpochPacking(layout, LENGTHS, ORDER)
    stream = np.concatenate([DOCUMENTS[d] for d in ORDER])
    sequences, dropped = layout.count(LENGTHS)
    assert (sequences, dropped) == ((len(stream) - 1) // 50, (len(stream) - 1) % 50)
    for index in range(sequences):
        pieces = each(packing.pieces([index], 0, layout.length))
        window = np.concatenate([DOCUMENTS[p.document][p.begin : p.end] for p in pieces])
        assert window.tolist() == stream[index * 50 : index * 50 + 51].tolist()


def test_one_token_more_makes_one_sequence_more() -> None:
    layout = Layout(length=10, isolate=False)
    assert layout.count(np.array([10])) == (0, 9)  # ten tokens have nine next tokens
    assert layout.count(np.array([11])) == (1, 0)


@pytest.mark.parametrize("alignment", [1, 16, 64])
def test_isolated_documents_start_at_the_alignment_and_lose_no_token(alignment: int) -> None:
    layout = Layout(length=64, isolate=True, alignment=alignment)
    packing = EpochPacking(layout, LENGTHS, ORDER)
    seen = {document: 0 for document in range(len(LENGTHS))}
    sequences, dropped = layout.count(LENGTHS)
    assert sequences * 64 + dropped == sum(-(-int(n) // alignment) * alignment for n in LENGTHS)
    read = []
    for index in range(sequences):
        free = 0
        for piece in each(packing.pieces([index], 0, layout.length)):
            assert piece.position % alignment == 0 and piece.position >= free and piece.end > piece.begin
            assert piece.begin == seen[piece.document]  # goes on where the sequence before stopped
            seen[piece.document] = piece.end
            free = piece.position + piece.end - piece.begin
            read.append(piece.document)
        assert free <= 64
    assert list(dict.fromkeys(read)) == ORDER[: len(dict.fromkeys(read))].tolist()
    unread = sum(int(n) - seen[d] for d, n in enumerate(LENGTHS))
    assert unread <= dropped


@pytest.mark.parametrize("isolate", [True, False])
def test_parts_of_a_sequence_are_what_the_whole_holds_there(isolate: bool) -> None:
    layout = Layout(length=64, isolate=isolate, alignment=16 if isolate else 1)
    packing, label = EpochPacking(layout, LENGTHS, ORDER), 0 if isolate else 1

    def filled(index: int, begin: int, end: int) -> list[tuple[int, int] | None]:
        """(document, token) at each position; None: padding."""
        found: list[tuple[int, int] | None] = [None] * (end - begin + label)
        for piece in each(packing.pieces([index], begin, end)):
            for token in range(piece.begin, piece.end):
                found[piece.position + token - piece.begin] = (piece.document, token)
        return found

    for index in range(layout.count(LENGTHS)[0]):
        whole = filled(index, 0, 64)
        for begin, end in [(0, 16), (16, 32), (16, 64), (32, 48), (48, 64)]:
            assert filled(index, begin, end) == whole[begin : end + label]


@pytest.mark.parametrize("isolate", [True, False])
def test_many_sequences_at_once_are_each_alone(isolate: bool) -> None:
    layout = Layout(length=64, isolate=isolate, alignment=16 if isolate else 1)
    packing = EpochPacking(layout, LENGTHS, ORDER)
    asked = [5, 0, 3, 3, 1]
    together = each(packing.pieces(asked, 16, 64))
    alone = [(row, piece) for row, index in enumerate(asked) for piece in each(packing.pieces([index], 16, 64))]
    assert together == [SimpleNamespace(**{**vars(piece), "row": row}) for row, piece in alone]


def test_a_length_that_no_alignment_divides_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"100 is not a multiple of the document alignment 64.*sequence_length"):
        Layout(length=100, isolate=True, alignment=64)
