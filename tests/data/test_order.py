import numpy as np

from titans_train.data.order import (
    GROUP_SHARDS,
    SEQUENCE_WINDOW,
    document_order,
    permutation,
    random_bits,
    sequence_places,
)

SHARDS = np.array([3, 5, 1, 4] * 6)


def test_every_epoch_reads_every_document_once() -> None:
    for epoch in range(3):
        order = document_order(SHARDS, seed=1, epoch=epoch, shuffle=True)
        assert sorted(order.tolist()) == list(range(int(SHARDS.sum())))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    orders = {(s, e): tuple(document_order(SHARDS, s, e, True).tolist()) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[2, 1] == tuple(document_order(SHARDS, 2, 1, True).tolist())


def test_without_shuffle_documents_come_as_they_were_written() -> None:
    assert document_order(SHARDS, 5, 7, shuffle=False).tolist() == list(range(int(SHARDS.sum())))


def test_reading_stays_within_a_group_of_shards() -> None:
    shard_of = np.repeat(np.arange(len(SHARDS)), SHARDS)
    visits = shard_of[document_order(SHARDS, 0, 0, True)]
    first = [int(np.flatnonzero(visits == shard).min()) for shard in range(len(SHARDS))]
    last = [int(np.flatnonzero(visits == shard).max()) for shard in range(len(SHARDS))]
    open_at_once = [sum(a <= place <= b for a, b in zip(first, last, strict=True)) for place in range(len(visits))]
    assert max(open_at_once) <= GROUP_SHARDS


def test_the_random_numbers_are_the_ones_of_every_version() -> None:
    """A run resumed after an upgrade of numpy must see the same order: these values are fixed for good."""
    assert random_bits(3, 1, 2, 3).tolist() == FIXED_BITS
    assert permutation(8, 1, 2, 3).tolist() == FIXED_PERMUTATION


FIXED_BITS = [12368030237656201616, 2047858591075935483, 9435677134316251571]
FIXED_PERMUTATION = [1, 3, 7, 5, 2, 0, 4, 6]


def test_sequences_are_shuffled_once_each_within_windows() -> None:
    total = 2 * SEQUENCE_WINDOW + 100
    every, epoch = np.arange(total), np.ones(total, np.int64)
    places = sequence_places(every, epoch, total, 3)
    assert sorted(places.tolist()) == every.tolist() != places.tolist()
    assert places[:SEQUENCE_WINDOW].max() < SEQUENCE_WINDOW
    assert (sequence_places(every, epoch * 2, total, 3) != places).any()
    mixed = np.array([total - 1, 5, SEQUENCE_WINDOW, 5])
    found = sequence_places(mixed, np.array([1, 1, 1, 2]), total, 3)
    assert found[:3].tolist() == places[mixed[:3]].tolist()
    assert found[3] == sequence_places(mixed, epoch[:4] * 2, total, 3)[3]
