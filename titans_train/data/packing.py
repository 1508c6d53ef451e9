"""Packing by construction: from the lengths alone, where the pieces of sequence i lie. No state.

`concatenate`: all documents, each with its end-of-document token, form one stream; sequence i is the window
[i L, i L + L], whose last token is only a label. `isolate`: each document takes a whole number of alignment
blocks of the stream, the rest of its last block is padding; sequence i is [i L, i L + L), and a document that
crosses a sequence's end goes on in the next one (as a new start, unless rows carry: SourceStream).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Parts of documents, one per entry of each array [pieces], in reading order: tokens [begin, end) of a document of
    `length` tokens go to `position` of row `row`."""

    row: Integers
    position: Integers
    document: Integers
    begin: Integers
    end: Integers
    length: Integers


@dataclass(frozen=True)
class Layout:
    """How documents are laid into sequences of `length` tokens."""

    length: int
    isolate: bool
    alignment: int = 1  # isolate: tokens; a document starts at a multiple of it

    def __post_init__(self) -> None:
        if self.isolate and self.length % self.alignment:
            raise ValueError(
                f"sequence length {self.length} is not a multiple of the document alignment {self.alignment}; "
                "isolated documents need that: change training.sequence_length"
            )

    def slots(self, lengths: Integers) -> Integers:
        """Stream positions each document takes (its end-of-document token is part of its length)."""
        return -(-lengths // self.alignment) * self.alignment if self.isolate else lengths

    def count(self, lengths: Integers) -> tuple[int, int]:
        """(full sequences in an epoch, stream positions dropped at its end); the same for every order."""
        total = int(self.slots(lengths).sum()) - (0 if self.isolate else 1)  # the last token is only a label
        sequences = max(total, 0) // self.length
        return sequences, max(total, 0) - sequences * self.length


class EpochPacking:
    """The pieces of every sequence of one epoch. Holds three int64 per document."""

    def __init__(self, layout: Layout, lengths: Integers, order: Integers) -> None:
        """`lengths` by document number; `order`: document numbers in reading order."""
        self._layout = layout
        self._lengths = lengths
        self._order = order
        slots = layout.slots(lengths[order])
        self._ends = np.cumsum(slots)
        self._begins = self._ends - slots

    def pieces(self, indices: Sequence[int] | Integers, begin: int, end: int) -> Pieces:
        """What fills positions [begin, end) of these sequences, each a row; `concatenate`: and the label after them.

        Padding has no piece.
        """
        low = np.asarray(indices, np.int64) * self._layout.length + begin
        high = low + (end - begin) + (0 if self._layout.isolate else 1)
        first = np.searchsorted(self._ends, low, side="right")
        count = np.searchsorted(self._ends, high, side="left") - first + 1
        row = np.arange(len(low)).repeat(count)
        place = np.arange(len(row)) + (first - np.cumsum(count) + count)[row]
        document, start, lowest = self._order[place], self._begins[place], low[row]
        length = self._lengths[document]
        begins, ends = np.maximum(lowest - start, 0), np.minimum(high[row] - start, length)
        found = (row, start + begins - lowest, document, begins, ends, length)
        filled = begins < ends
        return Pieces(*found) if filled.all() else Pieces(*(values[filled] for values in found))
