import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.__main__ import main
from data_prep.settings import split_of
from tests.data.corpus import END, LATER, WEIGHTS, mixed_config, run_config
from tests.data_prep.test_tokenizer import bpe_file
from titans_train.data import DataError, TokenDataset, open_dataset
from titans_train.data.cursor import Cursor

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


def test_sources_are_mixed_by_weight_and_the_weights_change_at_their_step(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, change=9))
    assert isinstance(dataset, TokenDataset)
    names = [dataset.place(number)[0].name for number in range(400)]
    for number in range(400):
        for name in sources:
            due = WEIGHTS[name] * min(number, 72) + LATER[name] * max(number - 72, 0)
            assert abs(names[:number].count(name) - due) < 1
    for number in (0, 1, 71, 72, 73, 399):
        figures = dataset.figures(number)
        assert {n: figures[f"source_{n}"]["sequences"] for n in sources} == {
            n: names[:number].count(n) for n in sources
        }


def test_weights_change_at_their_step_whatever_the_batch_sizes_before(sources: dict[str, Path], tmp_path: Path) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, change=9))
    assert isinstance(dataset, TokenDataset)
    assert dataset.mixture.firsts == [0, 9 * 8]
    other = dataset.at(Cursor(((0, 8), (5, 2))))
    assert other.mixture.firsts == [0, 5 * 8 + 4 * 2]
    assert [other.place(n) for n in range(48)] == [dataset.place(n) for n in range(48)]


def test_epochs_and_repeats_are_counted_per_source(sources: dict[str, Path], tmp_path: Path) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, change=None))
    assert isinstance(dataset, TokenDataset)
    first = dataset.sequences_total  # books is the source that is read first
    books = dataset.sources["books"].sequences_total
    assert dataset.figures(first)["source_books"] | {"share": 0} == {
        "sequences": books, "tokens": books * 128, "share": 0, "epoch": 1.0, "repeats": 0, "padding": 0.0
    }  # fmt: skip
    assert f"books: 13 documents, 5,694 tokens, {books} sequences an epoch; the run reads {books}, 1.00 epochs" in (
        dataset.describe(first)
    )
    later = next(n for n in range(first, first + 50) if dataset.place(n)[0].name == "books") + 1
    assert dataset.figures(later)["source_books"]["repeats"] == 1
    assert dataset.figures(later)["source_web"]["repeats"] == 0
    again, place = dataset.place(later - 1)
    assert (again.name, place) == ("books", books)


def test_a_source_of_the_mixture_reads_what_it_reads_alone_in_its_order(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, change=None))
    assert isinstance(dataset, TokenDataset)
    places = [dataset.place(number) for number in range(200)]
    for name, stream in dataset.sources.items():
        assert [place for found, place in places if found is stream] == list(range(sum(s is stream for s, _ in places)))
        epoch = torch.stack([stream.sequences([place]).tokens[0] for place in range(stream.sequences_total)])
        assert len({row.numpy().tobytes() for row in epoch}) == stream.sequences_total, name


def test_validation_is_every_sequence_of_every_source_once_evenly_spread(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, length=64), "validation")
    assert isinstance(dataset, TokenDataset)
    sizes = {name: stream.sequences_total for name, stream in dataset.sources.items()}
    total = sum(sizes.values())
    assert dataset.sequences_total == total and set(sizes) == set(sources)
    places = [(dataset.place(number)[0].name, dataset.place(number)[1]) for number in range(total)]
    assert sorted(places) == [(name, n) for name in sorted(sizes) for n in range(sizes[name])]
    for number in range(total):
        for name, size in sizes.items():
            count = sum(found == name for found, _ in places[:number])
            assert abs(count - size * number / total) <= 1
    assert dataset.bytes_per_token == pytest.approx(
        sum(size / total * dataset.sources[name].bytes_per_token for name, size in sizes.items())
    )


def test_a_source_without_a_whole_validation_sequence_is_left_out(sources: dict[str, Path], tmp_path: Path) -> None:
    dataset = open_dataset(mixed_config(sources, tmp_path, length=2048), "validation")
    assert isinstance(dataset, TokenDataset) and set(dataset.sources) == {"web", "code"}
    with pytest.raises(DataError, match="fill no sequence of 99999"):
        open_dataset(mixed_config(sources, tmp_path, length=99999), "validation")


def test_the_order_of_the_sources_in_a_config_does_not_count(sources: dict[str, Path], tmp_path: Path) -> None:
    one, other = (
        open_dataset(mixed_config(folders, tmp_path)) for folders in (sources, dict(reversed(sources.items())))
    )
    assert isinstance(one, TokenDataset) and isinstance(other, TokenDataset)
    assert [one.place(n)[0].name for n in range(200)] == [other.place(n)[0].name for n in range(200)]
    assert all(torch.equal(one.sequence(n).tokens, other.sequence(n).tokens) for n in range(30))


def test_a_source_that_is_never_read_need_not_suffice(sources: dict[str, Path], tmp_path: Path) -> None:
    config = mixed_config(sources, tmp_path, change=None, length=3000)
    books = config.data.sources["books"].model_copy(update={"weight": 0.0, "path": "/nowhere"})  # type: ignore[index]
    found = config.data.model_copy(update={"sources": {**config.data.sources, "books": books}})  # type: ignore[dict-item]
    dataset = open_dataset(config.model_copy(update={"data": found}))
    assert isinstance(dataset, TokenDataset) and set(dataset.sources) == {"web", "code"}


def test_sources_of_different_tokenizers_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    path = bpe_file(tmp_path)
    options = ["--tokenizer", str(path), "--validation-share", "0.2"]
    assert (
        main(["--input", str(sources["web"].parent / "texts" / "web"), "--output", str(tmp_path / "b"), *options]) == 0
    )
    with pytest.raises(DataError, match=r"data\.sources\.code was prepared with the huggingface tokenizer \w+, data"):
        open_dataset(mixed_config({**sources, "code": tmp_path / "b"}, tmp_path, vocabulary=5000))


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
@pytest.mark.parametrize("carry", [False, True])
def test_a_part_of_a_sequence_is_that_part_of_the_whole(
    prepared: Path, tmp_path: Path, packing: str, carry: bool
) -> None:
    dataset = open_tokens(prepared, tmp_path, packing=packing, carry=carry, alignment=16)
    for number in range(40):
        whole = dataset.sequence(number)
        for begin, end in [(0, 64), (64, 128), (32, 48), (112, 128)]:
            part = dataset.sequences([number], begin, end)[0]
            for name in ("tokens", "labels", "document_starts"):
                found, expected = getattr(part, name), getattr(whole, name)
                assert (found is None) == (expected is None)
                assert found is None or torch.equal(found, expected[begin:end]), (number, begin, name)


def test_a_part_reads_no_shard_that_it_does_not_need(prepared: Path, tmp_path: Path) -> None:
    """Ranks that share a sequence decompress only the shards that hold their own part."""
    folder = Path(shutil.copytree(prepared, tmp_path / "copy"))  # no shard of it is open in this process
    dataset = open_tokens(folder, tmp_path, shuffle=False, length=6400)
    dataset.sequences([0], 0, 100)
    assert len(list(tmp_path.glob("test/cache/**/shard.*.mds"))) == 1


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
