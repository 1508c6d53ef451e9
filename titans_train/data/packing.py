"""Packing by construction: from the lengths alone, where the pieces of sequence i lie. No state.

`concatenate`: all documents, each with its end-of-document token, form one stream; sequence i is the window
[i L, i L + L], whose last token is only a label. `isolate`: each document takes a whole number of alignment
blocks of the stream, the rest of its last block is padding; sequence i is [i L, i L + L), and a document that
crosses a sequence's end goes on in the next one (as a new start, unless rows carry: SourceStream).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """Tokens [begin, end) of a document, at `position` of what was asked for; `length`: of the whole document."""

    document: int
    begin: int
    end: int
    position: int
    length: int


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
    """The pieces of every sequence of one epoch. Holds two int64 per document."""

    def __init__(self, layout: Layout, lengths: Integers, order: Integers) -> None:
        """`lengths` by document number; `order`: document numbers in reading order."""
        self._layout = layout
        self._lengths = lengths
        self._order = order
        self._ends = np.cumsum(layout.slots(lengths[order]))

    def pieces(self, index: int, begin: int, end: int) -> list[Piece]:
        """What fills positions [begin, end) of sequence `index`, in order; `concatenate`: and the label after them.

        With `isolate` a piece may be empty of tokens: the rest is padding.
        """
        low = index * self._layout.length + begin
        high = low + (end - begin) + (0 if self._layout.isolate else 1)
        first = int(np.searchsorted(self._ends, low, side="right"))
        last = int(np.searchsorted(self._ends, high, side="left"))
        pieces = []
        for place in range(first, last + 1):
            document = int(self._order[place])
            start = int(self._ends[place - 1]) if place else 0
            length = int(self._lengths[document])
            from_here = max(low - start, 0)
            upto = min(high - start, length)
            pieces.append(Piece(document, from_here, max(upto, from_here), start + from_here - low, length))
        return pieces
