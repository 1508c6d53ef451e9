"""The endless stream of sequences of one source: a function of (seed, data, number) only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from titans_train.data.errors import DataError
from titans_train.data.order import document_order, sequence_places
from titans_train.data.packing import EpochPacking, Integers, Layout, Pieces
from titans_train.data.sample import IGNORE, Sample
from titans_train.data.shards import ShardStore

_KEPT_EPOCHS = 2  # the current one and, near its end, the next


class SourceStream:
    """Sequences by number over the documents of a store. Epochs follow each other without a seam in the numbers.

    With `rows` R (training.carry_state), the source has R rows of each global batch, and each goes on in the next: of
    the E sequences of an epoch, in stream order, row i reads its own E // R consecutive ones. An epoch's last E % R
    sequences are dropped.

    `sequences_total`: that an epoch reads. `dropped_tokens`: positions at an epoch's end that no sequence reads.
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
        self.sequences_total = self._span * rows if rows else self._packed
        self.dropped_tokens += (self._packed - self.sequences_total) * layout.length
        self.padding_share = 1 - int(lengths.sum()) / int(layout.slots(lengths).sum())
        self.bytes_per_token = store.text_bytes / store.tokens_total
        # A cache of this process; not sent to others.
        self._epochs: OrderedDict[int, EpochPacking] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": OrderedDict()}

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

    def pieces(self, numbers: Sequence[int], begin: int = 0, end: int | None = None) -> Pieces:
        """The documents' pieces at positions [begin, end) of these sequences, each a row."""
        end = self.layout.length if end is None else end
        epochs, places = self._places(np.asarray(numbers))
        if (epochs == epochs[0]).all():
            return self._packing(int(epochs[0])).pieces(places, begin, end)
        found = []
        for epoch in np.unique(epochs).tolist():
            (rows,) = np.nonzero(epochs == epoch)
            pieces = self._packing(epoch).pieces(places[rows], begin, end)
            found.append(replace(pieces, row=rows[pieces.row]))
        return Pieces(*(np.concatenate(values) for values in zip(*map(astuple, found), strict=True)))

    def sequences(self, numbers: Sequence[int], begin: int = 0, end: int | None = None) -> Sample:
        """Positions [begin, end) of these sequences, counted through all epochs: [n, end - begin].

        Nothing else is read. DataError names the shard that it cannot trust.
        """
        end = self.layout.length if end is None else end
        pieces, width = self.pieces(numbers, begin, end), end - begin
        # One position more: the label of the last one.
        upto = np.minimum(pieces.end + 1, pieces.length) if self.layout.isolate else pieces.end
        tokens = np.full((len(numbers), width + 1), self.store.manifest.tokenizer.end_of_document, self.store.dtype)
        self.store.read(pieces.document, pieces.begin, upto, tokens, pieces.row * (width + 1) + pieces.position)
        inputs, labels = (torch.from_numpy(tokens[:, at : at + width].astype(np.int64)) for at in (0, 1))
        fresh = np.array([begin == 0 and self.continues(number) is not True for number in numbers])
        if self.layout.isolate:
            labels[torch.from_numpy(~_labelled(pieces, upto, labels.shape))] = IGNORE
            return Sample(inputs, labels, torch.from_numpy(_starts(pieces, fresh, labels.shape)))
        starts = None
        if self._rows is not None:  # a state that a row does not go on from must still lead to its parameters
            starts = torch.zeros(inputs.shape, dtype=torch.bool)
            starts[:, 0] = torch.from_numpy(fresh)
        return Sample(inputs, labels, starts)

    def _places(self, numbers: Integers) -> tuple[Integers, Integers]:
        """(epoch, which of its packed sequences) each number is."""
        epochs, index = np.divmod(numbers, self.sequences_total)
        if self._rows is not None:
            steps, rows = np.divmod(index, self._rows)
            return epochs, rows * self._span + steps
        if self._shuffle:
            index = sequence_places(index, epochs, self._packed, self._seed)
        return epochs, index

    def _packing(self, epoch: int) -> EpochPacking:
        if epoch not in self._epochs:
            order = document_order(self.store.documents_per_shard, self._seed, epoch, self._shuffle)
            self._epochs[epoch] = EpochPacking(self.layout, self.store.lengths(), order)
        self._epochs.move_to_end(epoch)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]


def _labelled(pieces: Pieces, upto: NDArray[np.int64], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Isolated documents: where the next token is of the same document. Not at a document's last token."""
    change = np.zeros(shape[0] * (shape[1] + 1), np.int8)
    first = pieces.row * (shape[1] + 1) + pieces.position
    change[first] += 1
    change[first + (upto - pieces.begin) - 1] -= 1
    return np.cumsum(change, dtype=np.int8).astype(np.bool_).reshape(shape[0], -1)[:, : shape[1]]


def _starts(pieces: Pieces, fresh: NDArray[np.bool_], shape: Sequence[int]) -> NDArray[np.bool_]:
    """Isolated documents: their first tokens, and where one is cut by the beginning of a row that is `fresh`."""
    starts = np.zeros(tuple(shape), np.bool_)
    starts[pieces.row, pieces.position] = (pieces.begin == 0) | (fresh[pieces.row] & (pieces.position == 0))
    return starts
