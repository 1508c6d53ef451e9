import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.write import split_of
from tests.data.corpus import END, run_config
from titans_train.data import DataError, TokenDataset, open_dataset

IGNORED = -100


def texts_of(prepared: Path, split: str) -> list[bytes]:
    """The texts of a split, in the order they were prepared, taken from the source files and not from the shards."""
    files = sorted((prepared.parent / "texts").iterdir())
    texts = [path.read_text() for path in files]
    return [text.encode() for text in texts if split_of(text, share=0.2, seed=0) == split]


def open_tokens(
    prepared: Path, tmp_path: Path, split: str = "train", alignment: int = 1, **options: object
) -> TokenDataset:
    dataset = open_dataset(run_config(prepared, tmp_path, **options), split, alignment)  # type: ignore[arg-type]
    assert isinstance(dataset, TokenDataset)
    return dataset


def test_concatenated_sequences_are_the_texts_joined_by_the_end_token(prepared: Path, tmp_path: Path) -> None:
    dataset = open_tokens(prepared, tmp_path, shuffle=False)
    stream = [token for text in texts_of(prepared, "train") for token in (*text, END)]
    assert dataset.sequences_total == (len(stream) - 1) // 128 > 50
    assert dataset.dropped_tokens == (len(stream) - 1) % 128
    for number in range(dataset.sequences_total):
        sample = dataset.sequence(number)
        assert sample.tokens.tolist() == stream[number * 128 : number * 128 + 128]
        assert sample.labels.tolist() == stream[number * 128 + 1 : number * 128 + 129]
        assert sample.document_starts is None
        assert sample.tokens.dtype == sample.labels.dtype == torch.int64


def isolated_reference(texts: list[bytes], alignment: int, length: int) -> tuple[list[int], list[int], list[bool]]:
    tokens: list[int] = []
    labels: list[int] = []
    starts: list[bool] = []
    for text in texts:
        document = [*text, END]
        padding = -len(document) % alignment
        starts += [True] + [False] * (len(document) + padding - 1)
        tokens += document + [END] * padding
        labels += document[1:] + [IGNORED] * (padding + 1)
    starts = [start or place % length == 0 for place, start in enumerate(starts)]
    return tokens, labels, starts


@pytest.mark.parametrize("alignment", [1, 64])
def test_isolated_documents_are_padded_and_never_predict_each_other(
    prepared: Path, tmp_path: Path, alignment: int
) -> None:
    dataset = open_tokens(prepared, tmp_path, alignment=alignment, shuffle=False, packing="isolate")
    texts = texts_of(prepared, "train")
    tokens, labels, starts = isolated_reference(texts, alignment, 128)
    assert dataset.sequences_total == len(tokens) // 128
    assert dataset.padding_share == pytest.approx(1 - sum(len(text) + 1 for text in texts) / len(tokens))
    for number in range(dataset.sequences_total):
        part, sample = slice(number * 128, number * 128 + 128), dataset.sequence(number)
        assert sample.document_starts is not None and sample.document_starts.dtype == torch.bool
        assert sample.tokens.tolist() == tokens[part]
        assert sample.labels.tolist() == labels[part]
        assert sample.document_starts.tolist() == starts[part]


def test_epochs_follow_each_other_in_different_orders_with_the_same_tokens(prepared: Path, tmp_path: Path) -> None:
    dataset = open_tokens(prepared, tmp_path)
    total = dataset.sequences_total
    first = torch.stack([dataset.sequence(number).tokens for number in range(total)])
    second = torch.stack([dataset.sequence(total + number).tokens for number in range(total)])
    assert not torch.equal(first, second)
    difference = np.bincount(first.flatten(), minlength=257) - np.bincount(second.flatten(), minlength=257)
    assert abs(difference).sum() <= 2 * (dataset.dropped_tokens + 1)
    assert torch.equal(dataset.sequence(0).tokens, first[0])  # back across the border


def test_global_batches_are_consecutive_numbers_whatever_the_epoch(prepared: Path, tmp_path: Path) -> None:
    dataset = open_tokens(prepared, tmp_path)
    assert [n for step in range(3) for n in dataset.indices(step, 8)] == list(range(24))
    assert dataset.indices(1000, 8) == list(range(8000, 8008))


def test_another_seed_gives_another_order(prepared: Path, tmp_path: Path) -> None:
    one, other = (open_tokens(prepared, tmp_path, seed=seed).sequence(0).tokens for seed in (0, 1))
    assert not torch.equal(one, other)


def test_validation_has_one_fixed_order(prepared: Path, tmp_path: Path) -> None:
    dataset = open_tokens(prepared, tmp_path, "validation", seed=3)
    stream = [token for text in texts_of(prepared, "validation") for token in (*text, END)]
    assert dataset.sequence(1).tokens.tolist() == stream[128:256]


def test_bytes_per_token_count_the_end_tokens(prepared: Path, tmp_path: Path) -> None:
    texts = texts_of(prepared, "validation")
    size = sum(len(text) for text in texts)
    assert open_tokens(prepared, tmp_path, "validation").bytes_per_token == size / (size + len(texts))


def test_a_dataset_sent_to_another_process_takes_no_cached_tokens_along(prepared: Path, tmp_path: Path) -> None:
    dataset = open_tokens(prepared, tmp_path)
    expected = dataset.sequence(5)
    content = pickle.dumps(dataset)
    assert len(content) < 10_000
    assert torch.equal(pickle.loads(content).sequence(5).tokens, expected.tokens)


def test_a_corpus_shorter_than_one_sequence_is_refused_with_the_numbers(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"fill no sequence of 1000000; prepare more data or lower training"):
        open_tokens(prepared, tmp_path, length=1_000_000)


def test_a_model_with_too_small_a_vocabulary_is_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"vocabulary of 257, model\.vocabulary is 256; raise model\.vocabulary"):
        open_tokens(prepared, tmp_path, vocabulary=256)


def test_a_folder_that_was_not_prepared_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json.*set data\.path to a folder made by python -m data_prep"):
        open_tokens(tmp_path / "nothing", tmp_path)
    with pytest.raises(DataError, match=r"data\.path is not set"):
        open_dataset(run_config(None, tmp_path))
