from pathlib import Path

import pytest
import torch

from tests.data.corpus import run_config
from titans_train.config.schema import Recall
from titans_train.data import DataError, SyntheticDataset, loader, open_dataset
from titans_train.data.recall import RecallTask
from titans_train.plan import make_plan

TASK = Recall(pairs=16, keys=20, values=64, gap=30)
LENGTH = 4 * 16 + 30 + 6


def dataset(split: str = "train", seed: int = 0) -> SyntheticDataset:
    return SyntheticDataset(RecallTask(TASK), seed, split, LENGTH, vocabulary=86)


def test_each_pair_comes_once_and_each_key_is_asked_once_after_the_gap() -> None:
    source = dataset()
    for number in range(50):
        tokens = source.sequence(number).tokens.tolist()
        pairs = dict(zip(tokens[0:32:2], tokens[1:32:2], strict=True))
        asked = dict(zip(tokens[62:94:2], tokens[63:94:2], strict=True))
        assert len(pairs) == 16 and asked == pairs
        assert all(0 <= key < 20 and 20 <= value < 84 for key, value in pairs.items())
        assert set(tokens[32:62]) == {84} and set(tokens[94:]) == {85}


def test_with_spread_every_key_is_asked_once_anywhere_later_and_values_do_not_repeat() -> None:
    """Multi-query associative recall as Zoology publishes it."""
    task = Recall(pairs=8, keys=20, values=8, gap=2, spread=0.1)
    source, places = SyntheticDataset(RecallTask(task), 0, "train", 60, vocabulary=30), set()
    for number in range(50):
        sample = source.sequence(number)
        tokens, labels = sample.tokens.tolist(), sample.labels.tolist()
        pairs = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        asked = {place: label for place, label in enumerate(labels) if label != -100}
        assert len(set(pairs.values())) == len(pairs) == 8
        assert {tokens[place]: label for place, label in asked.items()} == pairs
        assert all(place >= 18 and place % 2 == 0 for place in asked)
        assert all(tokens[place] == 28 for place in range(16, 60) if place not in asked)
        places |= set(asked)
    assert len(places) == (60 - 18) // 2


def test_labels_are_the_values_at_the_asked_keys_and_nowhere_else() -> None:
    sample = dataset().sequence(3)
    labelled = (sample.labels != -100).nonzero().flatten().tolist()
    assert labelled == list(range(62, 94, 2))
    assert torch.equal(sample.labels[labelled], sample.tokens[[place + 1 for place in labelled]])
    assert sample.document_starts is None and sample.labels.dtype == torch.int64


def test_sequences_depend_on_seed_split_and_number_only() -> None:
    keys = [(split, seed, number) for split in ("train", "validation") for seed in (0, 1) for number in (0, 1)]
    drawn = {key: tuple(dataset(key[0], key[1]).sequence(key[2]).tokens.tolist()) for key in keys}
    assert len(set(drawn.values())) == len(keys)
    assert drawn["train", 1, 1] == tuple(dataset("train", 1).sequence(1).tokens.tolist())


def test_queries_come_in_another_order_than_the_pairs() -> None:
    tokens = dataset().sequence(0).tokens.tolist()
    assert tokens[0:32:2] != tokens[62:94:2]


def test_the_loader_serves_it_as_any_data(tmp_path: Path) -> None:
    config = run_config(None, tmp_path, recall=TASK, length=LENGTH, vocabulary=86)
    source = open_dataset(config, "train", alignment=16)
    batch = next(loader(source, make_plan(config, world_size=2), data_rank=1, start_step=2))[1]
    assert batch.sample_ids == [22, 23] and batch.document_starts is None
    assert torch.equal(batch.tokens[1], source.sequence(23).tokens)


@pytest.mark.parametrize(("task", "length", "vocabulary", "message"), [
    (Recall(pairs=21, keys=20), 400, 500, "pairs 21 > data.recall.keys 20"),
    (Recall(pairs=9, values=8, spread=0.1), 400, 500, "pairs 9 > data.recall.values 8; with spread"),
    (TASK, 93, 500, r"4 \* pairs \+ gap = 94 tokens, training.sequence_length is 93"),
    (TASK, 100, 85, r"keys \+ values \+ 2 = 86 token ids, model.vocabulary is 85"),
])  # fmt: skip
def test_a_task_that_does_not_fit_is_refused(task: Recall, length: int, vocabulary: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        SyntheticDataset(RecallTask(task), 0, "train", length, vocabulary)
