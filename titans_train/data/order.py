"""The order of documents as a function of (seed, epoch): nothing to save, nothing that depends on the layout.

Shuffling keeps reading local: shards are shuffled, then documents within groups of a few consecutive shards.
Only raw generator output is used, which numpy keeps stable between versions (it does not promise that for
`Generator.permutation`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

GROUP_SHARDS = 8  # shards whose documents are mixed with each other
SEQUENCE_WINDOW = 4096  # sequences that are mixed with each other

Integers = NDArray[np.int64]


def random_bits(count: int, *key: int) -> NDArray[np.uint64]:
    """`count` independent 64-bit numbers that depend on the key only."""
    raw: Any = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.asarray(raw, dtype=np.uint64)


def permutation(count: int, *key: int) -> Integers:
    """A random order of 0..count-1 that depends on the key only."""
    return np.argsort(random_bits(count, *key), kind="stable").astype(np.int64)


def sequence_places(indices: Integers, epochs: Integers, total: int, seed: int) -> Integers:
    """Which of an epoch's `total` packed sequences is read as its `index`-th, shuffled; for each index and its epoch.

    Consecutive sequences are cut from the same long document; a batch of them would be a batch of one document. So
    they are shuffled within windows of SEQUENCE_WINDOW, which keeps reading local. (Where rows carry they are not:
    each row of a batch reads another part of the epoch.)
    """
    windows, places = np.divmod(indices, SEQUENCE_WINDOW)
    found = np.empty(len(indices), np.int64)
    for window, epoch in set(zip(windows.tolist(), epochs.tolist(), strict=True)):
        first = window * SEQUENCE_WINDOW
        order = _window_order(window, min(SEQUENCE_WINDOW, total - first), seed, epoch)
        (here,) = np.nonzero((windows == window) & (epochs == epoch))
        found[here] = first + order[places[here]]
    return found


@lru_cache(maxsize=4)
def _window_order(window: int, count: int, seed: int, epoch: int) -> Integers:
    return permutation(count, seed, epoch, 2, window)


def document_order(documents_per_shard: Integers, seed: int, epoch: int, shuffle: bool) -> Integers:
    """Document numbers (counted through the shards) in the order epoch `epoch` reads them."""
    total = int(documents_per_shard.sum())
    if not shuffle:
        return np.arange(total, dtype=np.int64)
    first = np.cumsum(documents_per_shard) - documents_per_shard
    shards = permutation(len(documents_per_shard), seed, epoch, 0)
    bits = random_bits(total, seed, epoch, 1)
    order = np.empty(total, np.int64)
    done = 0
    for start in range(0, len(shards), GROUP_SHARDS):
        group = shards[start : start + GROUP_SHARDS]
        documents = np.concatenate([np.arange(first[s], first[s] + documents_per_shard[s]) for s in group])
        keys = bits[done : done + len(documents)]
        order[done : done + len(documents)] = documents[np.argsort(keys, kind="stable")]
        done += len(documents)
    return order
