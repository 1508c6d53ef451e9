"""Sequence i of a run: which documents it is cut from, and its tokens. A function of (seed, data, i) only."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.manifest import SPLITS
from titans_train.data.errors import DataError
from titans_train.data.order import document_order, sequence_place
from titans_train.data.packing import EpochPacking, Layout, Piece
from titans_train.data.recall import RecallDataset
from titans_train.data.sample import IGNORE, Sample
from titans_train.data.shards import ShardStore, Tokens

if TYPE_CHECKING:
    from titans_train.config.schema import RunConfig

_KEPT_EPOCHS = 2  # the current one and, near its end, the next
_KEPT_DOCUMENT_BYTES = 64 << 20  # consecutive sequences cut the same documents


class TokenDataset:
    """Sequences by number over prepared shards. Epochs follow each other without a seam in the numbers.

    With `carried_rows` R (training.carry_state), row i of each global batch of R continues row i of the one before: of
    the E sequences of an epoch, in stream order, it reads its own S = E // R consecutive ones, in S steps. An epoch's
    last E - R S sequences are dropped.

    `sequences_total`: sequences of one epoch. `dropped_tokens`: positions at an epoch's end that no step reads.
    `padding_share`: of the positions, with isolated documents. `bytes_per_token`: text bytes per token, the
    end-of-document tokens included. `fingerprint`: of the manifest, changes whenever the data does.
    """

    def __init__(
        self, store: ShardStore, layout: Layout, seed: int, shuffle: bool, carried_rows: int | None = None
    ) -> None:
        """DataError when the lengths file is damaged or there are too few tokens: for one sequence, or carried row."""
        self._store = store
        self._layout = layout
        self._seed = seed
        self._shuffle = shuffle
        lengths = store.lengths()
        self.sequences_total, self.dropped_tokens = layout.count(lengths)
        if self.sequences_total < 1:
            raise DataError(
                f"{store.path}, split {store.split}: {len(lengths)} documents of {int(lengths.sum())} tokens fill no "
                f"sequence of {layout.length}; prepare more data or lower training.sequence_length"
            )
        self._carried_rows = carried_rows
        if carried_rows is not None:
            self._check_rows(carried_rows)
            self.dropped_tokens += self.sequences_total % carried_rows * layout.length
        self.padding_share = 1 - int(lengths.sum()) / int(layout.slots(lengths).sum())
        self.bytes_per_token: float | None = store.entry.text_bytes / store.entry.tokens
        self.fingerprint = store.fingerprint
        # Caches of this process; not sent to others.
        self._lengths: NDArray[np.int64] | None = None
        self._epochs: OrderedDict[int, EpochPacking] = OrderedDict()
        self._documents: OrderedDict[int, Tokens] = OrderedDict()
        self._document_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        caches: dict[str, Any] = {"_epochs": OrderedDict(), "_documents": OrderedDict()}
        return {**self.__dict__, **caches, "_lengths": None, "_document_bytes": 0}

    def _check_rows(self, rows: int) -> None:
        if self.sequences_total < rows:
            raise DataError(
                f"{self._store.path}, split {self._store.split}: an epoch has {self.sequences_total} sequences of "
                f"{self._layout.length}, training.carry_state needs at least one for each of the {rows} rows of a "
                f"batch; lower training.global_batch_size to at most {self.sequences_total} or "
                "training.sequence_length, or prepare more data"
            )

    def indices(self, step: int, global_batch_size: int) -> list[int]:
        """Sequence numbers of global batch `step`, in order; of `carried_rows` rows where they carry."""
        if self._carried_rows is None:
            return list(range(step * global_batch_size, (step + 1) * global_batch_size))
        assert global_batch_size == self._carried_rows
        span = self.sequences_total // global_batch_size
        epoch, place = divmod(step, span)
        return [epoch * self.sequences_total + row * span + place for row in range(global_batch_size)]

    def sequence(self, number: int) -> Sample:
        """Sequence `number`, counted through all epochs. DataError names the shard it cannot trust."""
        epoch, index = divmod(number, self.sequences_total)
        shuffle = self._shuffle and self._carried_rows is None
        place = sequence_place(index, self.sequences_total, self._seed, epoch, shuffle)
        pieces, continues = self._packing(epoch).pieces(place), self._continues(index)
        return self._isolated(pieces, continues) if self._layout.isolate else self._concatenated(pieces, continues)

    def _continues(self, index: int) -> bool | None:
        """Of an epoch's sequence `index`: False for the first one of a row, None where rows do not carry."""
        if self._carried_rows is None:
            return None
        return index % (self.sequences_total // self._carried_rows) > 0

    def _concatenated(self, pieces: list[Piece], continues: bool | None) -> Sample:
        window = np.concatenate([self._document(piece.document)[piece.begin : piece.end] for piece in pieces])
        stream = torch.from_numpy(window.astype(np.int64))
        return Sample(stream[:-1].clone(), stream[1:].clone(), None, continues)

    def _isolated(self, pieces: list[Piece], continues: bool | None) -> Sample:
        """A document cut by the sequence's start is a start as well, unless the row carries what came before."""
        length = self._layout.length
        tokens = np.full(length, self._store.manifest.tokenizer.end_of_document, np.int64)
        labels = np.full(length, IGNORE, np.int64)
        starts = np.zeros(length, np.bool_)
        for piece in pieces:
            document = self._document(piece.document)
            position, count = piece.position, piece.end - piece.begin
            tokens[position : position + count] = document[piece.begin : piece.end]
            # The document's last token has no next one; a piece cut by the sequence's end has it in the next piece.
            following = document[piece.begin + 1 : piece.end + 1]
            labels[position : position + len(following)] = following
            starts[position] = piece.begin == 0 or not continues
        return Sample(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(starts), continues)

    def _packing(self, epoch: int) -> EpochPacking:
        if epoch not in self._epochs:
            order = document_order(self._store.documents_per_shard, self._seed, epoch, self._shuffle)
            self._epochs[epoch] = EpochPacking(self._layout, self._length_array(), order)
        self._epochs.move_to_end(epoch)
        while len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _length_array(self) -> NDArray[np.int64]:
        if self._lengths is None:
            self._lengths = self._store.lengths()
        return self._lengths

    def _document(self, number: int) -> Tokens:
        if number not in self._documents:
            tokens = self._store.document(number, int(self._length_array()[number]))
            self._documents[number] = tokens
            self._document_bytes += tokens.nbytes
        self._documents.move_to_end(number)
        while self._document_bytes > _KEPT_DOCUMENT_BYTES and len(self._documents) > 1:
            self._document_bytes -= self._documents.popitem(last=False)[1].nbytes
        return self._documents[number]


def open_dataset(config: RunConfig, split: str = "train", alignment: int = 1) -> TokenDataset | RecallDataset:
    """The dataset a run config names. `alignment`: the model's document alignment, ModelShape.document_alignment.

    Training is shuffled where data.shuffle says so (only its documents with training.carry_state); validation is read
    in one fixed order, and its rows do not carry. DataError: data that is missing, damaged, too little, or does not fit
    the model.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    if config.data.source == "recall":
        return RecallDataset.from_config(config, split)
    if config.data.path is None:
        raise DataError("data.path is not set; set it to a folder made by python -m data_prep")
    run_directory = Path(config.run.folder) / config.run.name
    cache = Path(config.data.cache) if config.data.cache is not None else run_directory / "cache"
    store = ShardStore(config.data.path, split, cache)
    if store.manifest.tokenizer.vocabulary > config.model.vocabulary:
        raise DataError(
            f"{store.path} was made with a vocabulary of {store.manifest.tokenizer.vocabulary}, model.vocabulary is "
            f"{config.model.vocabulary}; raise model.vocabulary to at least {store.manifest.tokenizer.vocabulary}"
        )
    layout = Layout(config.training.sequence_length, config.data.packing == "isolate", alignment)
    train, training = split == "train", config.training
    rows = training.global_batch_size if train and training.carry_state else None
    return TokenDataset(store, layout, config.run.seed, config.data.shuffle and train, rows)
