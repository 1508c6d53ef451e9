"""Sequence n of a run: from which source it is and its tokens. A function of (seed, data, weights, n) only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from data_prep.manifest import SPLITS
from data_prep.token_bytes import Table
from data_prep.tokenizer import Tokenizer
from titans_train.data.cache import Cache, note_shared_memory
from titans_train.data.cursor import Cursor
from titans_train.data.errors import DataError
from titans_train.data.order import GROUP_SHARDS
from titans_train.data.packing import Layout
from titans_train.data.remote import Remote
from titans_train.data.sample import IGNORE, Sample
from titans_train.data.shards import ShardStore
from titans_train.data.source import SourceStream
from titans_train.data.synthetic import SyntheticDataset
from titans_train.data.tokenizer import open_tokenizer, paths_of
from titans_train.mixing import Interleaved, Mixture, Weights, phases_of

if TYPE_CHECKING:
    from titans_train.config.schema import RunConfig

ONLY = "data"  # the name of the source where data.path gives one


class TokenDataset:
    """The sources of a run, mixed sequence by sequence: by weight, or for validation each sequence of each source once.

    `length`: tokens of a sequence. `sequences_total`: until the first source has been read once; of a validation split,
    all. `padding_share` and `bytes_per_token` (text bytes per token, end-of-document tokens included): means with the
    weights of step 1. `fingerprints`: by source, of what was prepared; change whenever the data does.
    """

    def __init__(self, sources: Mapping[str, SourceStream], weights: Weights | None, cursor: Cursor) -> None:
        """`weights`: None for validation. The order of `sources` does not count."""
        self.sources = dict(sorted(sources.items()))
        self.weights = weights or ()
        self.fingerprints = {name: stream.store.fingerprint for name, stream in self.sources.items()}
        entry = next(iter(self.sources.values())).store.manifest.tokenizer  # the same for all
        self.tokenizer = {"kind": entry.kind, "sha256": entry.sha256}
        streams = list(self.sources.values())
        self.length = streams[0].layout.length
        self.mixture: Mixture | Interleaved
        if weights is None:
            self.mixture = Interleaved([stream.sequences_total for stream in streams])
            self.sequences_total = sum(stream.sequences_total for stream in streams)
            shares = [stream.sequences_total / self.sequences_total for stream in streams]
        else:
            self.mixture = Mixture(list(self.sources), _phases(weights, cursor))
            first = self.mixture.phases[0]
            self.sequences_total = min(
                _until(first.order, source, share, streams[source].sequences_total)
                for source, share in enumerate(first.shares)
                if share
            )
            shares = [share / first.period for share in first.shares]
        self.padding_share = sum(w * s.padding_share for w, s in zip(shares, streams, strict=True))
        self.dropped_tokens = sum(s.dropped_tokens for s in streams)
        self.bytes_per_token: float | None = sum(w * s.bytes_per_token for w, s in zip(shares, streams, strict=True))
        self._bytes_of_tokens: Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes_of_tokens": None}

    def at(self, cursor: Cursor) -> TokenDataset:
        """The same with the steps of changed weights counted by another cursor."""
        return TokenDataset(self.sources, self.weights or None, cursor)

    def place(self, number: int) -> tuple[SourceStream, int]:
        """The source of sequence `number` of the run, and its number there."""
        source, place = self.mixture.place(number)
        return list(self.sources.values())[source], place

    def sequence(self, number: int) -> Sample:
        """Sequence `number` of the run, [length]."""
        return self.sequences([number])[0]

    def sequences(self, numbers: Sequence[int], begin: int = 0, end: int | None = None) -> Sample:
        """Positions [begin, end) of these sequences of the run, [n, end - begin]; nothing else is read."""
        streams = list(self.sources.values())
        if len(streams) == 1:
            return streams[0].sequences(numbers, begin, end)
        places = [self.mixture.place(number) for number in numbers]
        parts, order = [], []
        for source in dict.fromkeys(source for source, _ in places):
            rows = [row for row, (of, _) in enumerate(places) if of == source]
            parts.append(streams[source].sequences([places[row][1] for row in rows], begin, end))
            order += rows
        return parts[0] if len(parts) == 1 else Sample.join(parts, order)

    def text_bytes(self, sample: Sample) -> list[float]:
        """Bytes of text that the labels of each sequence of `sample` [n, L] stand for; NaN where that is not known."""
        store = next(iter(self.sources.values())).store
        if self._bytes_of_tokens is None:
            self._bytes_of_tokens = _bytes_of_tokens(store)
        table, tokens, labels = self._bytes_of_tokens, sample.tokens.numpy(), sample.labels.numpy()
        first = tokens == store.manifest.tokenizer.end_of_document  # the label is the first token of a document
        found = table[labels.clip(0, len(table) - 1), first.astype(np.int64)]
        sums: list[float] = np.where(labels == IGNORE, 0, found).sum(-1).tolist()
        return sums

    def readers_started(self) -> None:
        """So that the next run can clean up after this one, should it be killed."""
        note_shared_memory()

    def describe(self, sequences: int) -> list[str]:
        """A line for each source: what there is, and how often `sequences` of the run read it."""
        lines = []
        for stream, count in zip(self.sources.values(), self._counts(sequences), strict=True):
            padding = f", {stream.padding_share:.1%} padding" if stream.layout.isolate else ""
            lines.append(
                f"{stream.name}: {stream.store.documents:,} documents, {stream.store.tokens_total:,} tokens{padding}, "
                f"{stream.sequences_total:,} sequences an epoch; the run reads {count:,}, "
                f"{count / stream.sequences_total:.2f} epochs"
            )
        return lines

    def _counts(self, sequences: int) -> list[int]:
        assert isinstance(self.mixture, Mixture)
        return self.mixture.counts(sequences)

    def figures(self, sequences: int) -> dict[str, dict[str, float]]:
        """For each source, of the first `sequences` of the run: how many, their positions and share, epochs, repeats.

        epoch: how often the source has been read, a fraction. repeats: how often it was begun again. padding: share of
        the positions that hold no document.
        """
        found = {}
        for (name, stream), count in zip(self.sources.items(), self._counts(sequences), strict=True):
            found[f"source_{name}"] = {
                "sequences": count,
                "tokens": count * self.length,
                "share": count / max(sequences, 1),
                "epoch": count / stream.sequences_total,
                "repeats": max(count - 1, 0) // stream.sequences_total,
                "padding": stream.padding_share,
            }
        return found


def _bytes_of_tokens(store: ShardStore) -> Table:
    """NaN where the tokenizer does not tell, or is not to be had: no reason to end a training."""
    try:
        table = store.tokenizer().bytes_of_tokens()
    except (DataError, ImportError):
        table = None
    return np.full((store.manifest.tokenizer.vocabulary, 2), np.nan) if table is None else table


def _phases(weights: Weights, cursor: Cursor) -> list[tuple[int, Mapping[str, float]]]:
    """By first sequence; of weights that begin with the same sequence the last ones count."""
    return list({cursor.sequences(steps): by_source for steps, by_source in weights}.items())


def _until(order: Any, source: int, share: int, sequences: int) -> int:
    """How many sequences of the mixture hold `sequences` of a source at most."""
    periods, rest = divmod(sequences, share)
    total = periods * len(order)
    for chosen in order:
        rest -= chosen == source
        if rest < 0:
            break
        total += 1
    return total


def weights_of(config: RunConfig) -> Weights:
    """The weights of the sources that are read at any time."""
    if config.data.sources is None:
        return ((0, {ONLY: 1.0}),)
    phases = phases_of(config.data)
    read = {name for _, weights in phases for name, weight in weights.items() if weight}
    return tuple((steps, {name: weights[name] for name in sorted(read)}) for steps, weights in phases)


def open_dataset(
    config: RunConfig, split: str = "train", alignment: int = 1, carried: bool | None = None
) -> TokenDataset | SyntheticDataset:
    """The dataset a run config names. `alignment`: the model's document alignment, ModelShape.document_alignment.

    Training is shuffled where data.shuffle says so (only its documents with training.carry_state); validation is every
    sequence of every source once, in one fixed order, and its rows do not carry. `carried` False: no rows carry.
    DataError: data that is missing, damaged, too little, or does not fit the model or each other.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {SPLITS}")
    if config.data.source != "shards":
        return SyntheticDataset.from_config(config, split)
    stores, layout = _open_stores(config, split), Layout(config.training.sequence_length, _isolates(config), alignment)
    cursor = Cursor.constant(config.training.global_batch_size)
    if split == "validation":
        return TokenDataset(_held_out(config, stores, layout), None, cursor)
    weights = weights_of(config)
    rows = _rows(config, weights, list(stores)) if config.training.carry_state and carried is not False else {}
    shuffle = config.data.shuffle
    streams = {
        name: SourceStream(store, layout, _seed(config, name), shuffle, rows.get(name), name)
        for name, store in stores.items()
    }
    return TokenDataset(streams, weights, cursor)


def _isolates(config: RunConfig) -> bool:
    return config.data.packing == "isolate"


def _held_out(config: RunConfig, stores: dict[str, ShardStore], layout: Layout) -> dict[str, SourceStream]:
    """In one fixed order. A source without a whole sequence there is left out, unless there is no other."""
    whole = {name: store for name, store in stores.items() if layout.count(store.lengths())[0]} or stores
    return {name: SourceStream(store, layout, _seed(config, name), False, None, name) for name, store in whole.items()}


def tokenizer_of_data(config: RunConfig) -> Tokenizer:
    """The one that all sources were prepared with. DataError: it cannot be read."""
    remote = Remote(timeout_seconds=config.data.remote_timeout_seconds)
    return open_tokenizer(next(paths_of(config.data)), data_cache(config), remote)


def data_cache(config: RunConfig) -> Cache:
    """The folder that takes decompressed and fetched shards, with its limit."""
    limit = config.data.cache_limit_gib
    folder = config.data.cache or str(Path(config.run.folder) / config.run.name / "cache")
    return Cache(Path(folder), None if limit is None else int(limit * 2**30))


def _open_stores(config: RunConfig, split: str) -> dict[str, ShardStore]:
    data, cache, remote = config.data, data_cache(config), Remote(timeout_seconds=config.data.remote_timeout_seconds)
    if data.sources is None:
        if data.path is None:
            raise DataError("data.path is not set; set it to a folder made by python -m data_prep")
        stores = {ONLY: ShardStore(data.path, split, cache, None, remote)}
    else:
        read = weights_of(config)[0][1]
        stores = {n: ShardStore(data.sources[n].path, split, cache, data.sources[n].part, remote) for n in read}
    first = next(iter(stores))
    for name, store in stores.items():
        _check_vocabulary(config, store)
        ours, theirs = stores[first].manifest.tokenizer, store.manifest.tokenizer
        if ours.sha256 != theirs.sha256:
            raise DataError(
                f"data.sources.{name} was prepared with the {theirs.kind} tokenizer {theirs.sha256[:12]}, "
                f"data.sources.{first} with the {ours.kind} tokenizer {ours.sha256[:12]}; prepare both with the same"
            )
    # The shards whose documents are mixed with each other, and the next such group.
    cache.check_room(sum(store.largest_shards(2 * GROUP_SHARDS) for store in stores.values()))
    return stores


def _check_vocabulary(config: RunConfig, store: ShardStore) -> None:
    needed = store.manifest.tokenizer.vocabulary
    if needed > config.model.vocabulary:
        raise DataError(
            f"{store.path} was made with a vocabulary of {needed}, model.vocabulary is {config.model.vocabulary}; "
            f"raise model.vocabulary to at least {needed}"
        )


def _rows(config: RunConfig, weights: Weights, names: list[str]) -> dict[str, int]:
    """How many rows of each global batch a source has, where rows carry. The config's checks make them whole."""
    counts = Mixture(names, [(0, weights[0][1])]).counts(config.training.global_batch_size)
    return dict(zip(names, counts, strict=True))


def _seed(config: RunConfig, name: str) -> int:
    """Sources of the same data under two names are not read in the same order."""
    return config.run.seed if name == ONLY else (config.run.seed << 32) + (xxhash.xxh32_intdigest(name) or 1)
