"""The endless stream of sequences of one source: a function of (seed, data, number) only."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from titans_train.data.errors import DataError
from titans_train.data.order import document_order, sequence_place
from titans_train.data.packing import EpochPacking, Layout, Piece
from titans_train.data.sample import IGNORE, Sample
from titans_train.data.shards import ShardStore

_KEPT_EPOCHS = 2  # the current one and, near its end, the next


class SourceStream:
    """Sequences by number over the documents of a store. Epochs follow each other without a seam in the numbers.

    With `rows` R (training.carry_state), the source has R rows of each global batch, and each goes on in the next: of
    the E sequences of an epoch, in stream order, row i reads its own E // R consecutive ones. An epoch's last E % R
    sequences are dropped.

    `sequences`: that an epoch reads. `dropped_tokens`: positions at an epoch's end that no sequence reads.
    `padding_share`: of the positions, with isolated documents.
    """

    def __init__(
        self, store: ShardStore, layout: Layout, seed: int, shuffle: bool, rows: int | None = None, name: str = "data"
    ) -> None:
        """DataError when the lengths file is damaged or there are too few tokens: for one sequence, or carried row."""
        self.store, self.layout, self.name = store, layout, name
        self._seed, self._shuffle, self._rows = seed, shuffle, rows
        lengths = store.lengths()
        self._packed, self.dropped_tokens = layout.count(lengths)
        self._check_enough(int(lengths.sum()))
        self._span = self._packed // rows if rows else 1  # steps of an epoch, where rows carry
        self.sequences = self._span * rows if rows else self._packed
        self.dropped_tokens += (self._packed - self.sequences) * layout.length
        self.padding_share = 1 - int(lengths.sum()) / int(layout.slots(lengths).sum())
        self.bytes_per_token = store.text_bytes / store.tokens_total
        # Caches of this process; not sent to others.
        self._lengths: NDArray[np.int64] | None = None
        self._epochs: OrderedDict[int, EpochPacking] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict(), "_lengths": None}

    def _check_enough(self, tokens: int) -> None:
        store, length, rows = self.store, self.layout.length, self._rows
        if self._packed < 1:
            raise DataError(
                f"{store.path}, split {store.split}: {store.documents} documents of {tokens} tokens fill no sequence "
                f"of {length}; prepare more data or lower training.sequence_length"
            )
        if rows is not None and self._packed < rows:
            raise DataError(
                f"{store.path}, split {store.split}: an epoch has {self._packed} sequences of {length}, "
                f"training.carry_state needs at least one for each of the {rows} rows of a batch; lower "
                f"training.global_batch_size to at most {self._packed} or training.sequence_length, or prepare more "
                "data"
            )

    def continues(self, number: int) -> bool | None:
        """Whether sequence `number` goes on where its row was in the batch before; None where rows do not carry."""
        return None if self._rows is None else number // self._rows % self._span > 0

    def pieces(self, number: int, begin: int = 0, end: int | None = None) -> list[Piece]:
        """The documents' pieces at positions [begin, end) of sequence `number`."""
        epoch, index = self._place(number)
        return self._packing(epoch).pieces(index, begin, self.layout.length if end is None else end)

    def sequence(self, number: int, begin: int = 0, end: int | None = None) -> Sample:
        """Positions [begin, end) of sequence `number`, counted through all epochs; nothing else is read.

        DataError names the shard that it cannot trust.
        """
        end = self.layout.length if end is None else end
        pieces = self.pieces(number, begin, end)
        fresh = self.continues(number) is not True
        if self.layout.isolate:
            return self._isolated(pieces, end - begin, fresh and begin == 0)
        return self._concatenated(pieces, self._rows is not None, fresh and begin == 0)

    def _place(self, number: int) -> tuple[int, int]:
        """(epoch, which of its packed sequences) `number` is."""
        epoch, index = divmod(number, self.sequences)
        if self._rows is not None:
            step, row = divmod(index, self._rows)
            return epoch, row * self._span + step
        return epoch, sequence_place(index, self._packed, self._seed, epoch, self._shuffle)

    def _concatenated(self, pieces: list[Piece], carried: bool, fresh: bool) -> Sample:
        read = [self.store.tokens(p.document, p.begin, p.end) for p in pieces]
        stream = torch.from_numpy(np.concatenate(read, dtype=np.int64))
        starts = None
        if carried:  # a state that a row does not go on from must still lead to its parameters: a start drops it
            starts = torch.zeros(len(stream) - 1, dtype=torch.bool)
            starts[0] = fresh
        return Sample(stream[:-1], stream[1:], starts)

    def _isolated(self, pieces: list[Piece], length: int, fresh: bool) -> Sample:
        """`fresh`: a document cut by the beginning is a start as well: the sequence's, and no row carries over it."""
        tokens = np.full(length, self.store.manifest.tokenizer.end_of_document, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        starts = np.zeros(length, np.bool_)
        for piece in pieces:
            position, count = piece.position, piece.end - piece.begin
            starts[position] = piece.begin == 0 or (fresh and position == 0)
            if count == 0:
                continue  # only the document's padding reaches into this part
            # The document's last token has no next one; a piece cut by the sequence's end has it in the next piece.
            read = self.store.tokens(piece.document, piece.begin, min(piece.end + 1, piece.length))
            tokens[position : position + count] = read[:count]
            labels[position : position + len(read) - 1] = read[1:]
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(starts))

    def _packing(self, epoch: int) -> EpochPacking:
        if epoch not in self._epochs:
            order = document_order(self.store.documents_per_shard, self._seed, epoch, self._shuffle)
            self._epochs[epoch] = EpochPacking(self.layout, self._length_array(), order)
        self._epochs.move_to_end(epoch)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _length_array(self) -> NDArray[np.int64]:
        if self._lengths is None:
            self._lengths = self.store.lengths()
        return self._lengths
