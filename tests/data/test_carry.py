"""training.carry_state: each row of a batch goes on where it ended in the batch before, on any layout."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import END, mixed_config, run_config
from tests.data.test_dataset import isolated_reference, open_tokens, texts_of
from tests.data.test_loader import LAYOUTS, global_batches
from titans_train.data import Batch, DataError, TokenDataset, loader, open_dataset
from titans_train.plan import make_plan

ROWS, LENGTH, STEPS = 8, 128, 48


def batches(prepared: Path, tmp_path: Path, alignment: int = 1, **options: object) -> Iterator[Batch]:
    """The global batches of STEPS steps, each as one Batch."""
    config = run_config(prepared, tmp_path, carry=True, micro=ROWS, steps=STEPS, **options)  # type: ignore[arg-type]
    return (step[0] for step in loader(open_dataset(config, "train", alignment), make_plan(config, world_size=1)))


def joined(steps: list[Batch], name: str) -> list[list[int]]:
    """What each row reads over these steps."""
    rows: list[list[int]] = torch.cat([getattr(batch, name) for batch in steps], 1).tolist()
    return rows


def span(prepared: Path, tmp_path: Path, packing: str = "concatenate") -> int:
    """Steps of an epoch."""
    steps = open_tokens(prepared, tmp_path, carry=True, packing=packing).sequences_total // ROWS
    assert 1 < steps < STEPS < 3 * steps  # an epoch ends on the way
    return steps


@pytest.fixture(scope="module", params=["concatenate", "isolate"])
def uncut(
    request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[str]]:
    """A packing, and its global batches in one process."""
    config = run_config(prepared, tmp_path_factory.mktemp("runs"), packing=request.param, carry=True)
    found = global_batches(config, 1, alignment=64)
    assert len(set(found)) == len(found) == 24
    return request.param, found


@pytest.mark.parametrize(("ranks", "workers"), LAYOUTS)
def test_rows_do_not_depend_on_ranks_and_workers(
    prepared: Path, tmp_path: Path, uncut: tuple[str, list[str]], ranks: int, workers: int
) -> None:
    packing, expected = uncut
    config = run_config(prepared, tmp_path, packing=packing, workers=workers, carry=True)
    assert global_batches(config, ranks, alignment=64) == expected


@pytest.mark.parametrize(("micro", "ranks", "start"), [(1, 1, 0), (8, 1, 0), (4, 2, 11), (1, 4, 17), (2, 1, 23)])
def test_rows_do_not_depend_on_micro_batches_and_a_resume(
    prepared: Path, tmp_path: Path, uncut: tuple[str, list[str]], micro: int, ranks: int, start: int
) -> None:
    packing, expected = uncut
    config = run_config(prepared, tmp_path, packing=packing, micro=micro, carry=True)
    assert global_batches(config, ranks, start, alignment=64) == expected[start:]


def test_each_row_reads_its_own_part_of_the_stream(prepared: Path, tmp_path: Path) -> None:
    steps = span(prepared, tmp_path)
    size = steps * LENGTH
    stream = [token for text in texts_of(prepared, "train") for token in (*text, END)]
    epoch = list(batches(prepared, tmp_path, shuffle=False))[:steps]
    assert joined(epoch, "tokens") == [stream[row * size : (row + 1) * size] for row in range(ROWS)]
    assert joined(epoch, "labels") == [stream[row * size + 1 : (row + 1) * size + 1] for row in range(ROWS)]


def test_shuffled_documents_stay_whole_across_batches(prepared: Path, tmp_path: Path) -> None:
    steps = span(prepared, tmp_path)
    read = list(batches(prepared, tmp_path))
    texts = {tuple(text) for text in texts_of(prepared, "train")}
    for epoch in (read[:steps], read[steps : 2 * steps]):
        for tokens, labels in zip(joined(epoch, "tokens"), joined(epoch, "labels"), strict=True):
            assert labels[:-1] == tokens[1:]  # the last label of a batch is the row's first token of the next
            ends = [place for place, token in enumerate(tokens) if token == END]
            whole = [tuple(tokens[a + 1 : b]) for a, b in zip(ends, ends[1:], strict=False)]
            assert len(whole) > 1 and texts.issuperset(whole)
    assert not torch.equal(read[0].tokens, read[steps].tokens)  # documents come in another order


@pytest.mark.parametrize("alignment", [1, 64])
def test_an_isolated_document_starts_only_where_no_state_is_carried_into_it(
    prepared: Path, tmp_path: Path, alignment: int
) -> None:
    dataset = open_tokens(prepared, tmp_path, alignment=alignment, carry=True, packing="isolate")
    size = dataset.sequences_total // ROWS * LENGTH
    tokens, labels, starts = isolated_reference(texts_of(prepared, "train"), alignment, size)  # starts at row borders
    options = {"packing": "isolate", "shuffle": False}
    epoch = list(batches(prepared, tmp_path, alignment, **options))[: size // LENGTH]
    for name, expected in (("tokens", tokens), ("labels", labels), ("document_starts", starts)):
        assert joined(epoch, name) == [expected[row * size : (row + 1) * size] for row in range(ROWS)], name
    cut = [batch for batch in epoch[1:] if not bool(batch.document_starts[:, 0].all())]  # type: ignore[index]
    assert cut


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_rows_start_afresh_at_an_epochs_first_step_only(prepared: Path, tmp_path: Path, packing: str) -> None:
    steps = span(prepared, tmp_path, packing)
    for step, batch in enumerate(batches(prepared, tmp_path, packing=packing)):
        starts = batch.document_starts
        assert starts is not None and starts.dtype == torch.bool
        if packing == "concatenate":
            assert starts[:, 0].tolist() == [step % steps == 0] * ROWS and not starts[:, 1:].any()
        else:
            assert starts[:, 0].all() or step % steps > 0


def test_epochs_read_the_same_numbers_once_each_and_drop_the_rest(prepared: Path, tmp_path: Path) -> None:
    carrying, plain = (open_tokens(prepared, tmp_path, carry=carry) for carry in (True, False))
    stream, total = carrying.sources["data"], plain.sources["data"].sequences_total
    steps = total // ROWS
    assert stream.sequences_total == steps * ROWS
    for epoch in range(3):
        epochs, places = stream._places(np.arange(epoch * steps * ROWS, (epoch + 1) * steps * ROWS))
        assert set(epochs.tolist()) == {epoch} and sorted(places.tolist()) == list(range(steps * ROWS))
    epochs, places = stream._places(ROWS * (steps + 1) + np.arange(ROWS))
    assert epochs.tolist() == [1] * ROWS and places.tolist() == [row * steps + 1 for row in range(ROWS)]
    assert carrying.dropped_tokens - plain.dropped_tokens == (total - ROWS * steps) * LENGTH > 0


def test_without_carry_and_in_validation_nothing_continues(prepared: Path, tmp_path: Path) -> None:
    config = run_config(prepared, tmp_path)
    assert next(loader(open_dataset(config), make_plan(config, world_size=1)))[0].document_starts is None
    one, other = (
        open_tokens(prepared, tmp_path, "validation", carry=carry, packing="isolate") for carry in (False, True)
    )
    for number in range(one.sequences_total):
        sample, same = one.sequence(number), other.sequence(number)
        assert sample.document_starts is not None and same.document_starts is not None
        assert torch.equal(sample.tokens, same.tokens)
        assert torch.equal(sample.document_starts, same.document_starts)
    carrying = run_config(prepared, tmp_path, carry=True)
    assert open_dataset(carrying, carried=False).sequence(0).document_starts is None


def test_fewer_sequences_than_rows_are_refused(prepared: Path, tmp_path: Path) -> None:
    stream = sum(len(text) + 1 for text in texts_of(prepared, "train"))
    length = (stream - 1) // ROWS
    dataset = open_tokens(prepared, tmp_path, length=length, carry=True)
    starts = dataset.sequence(41).document_starts  # one sequence for each row: every step is an epoch
    assert starts is not None and starts.tolist() == [True] + [False] * (length - 1)
    with pytest.raises(DataError, match=r"has 7 sequences.*at least one for each of the 8 rows.*to at most 7 or"):
        open_tokens(prepared, tmp_path, length=length + 1, carry=True)


def test_a_row_reads_one_source_from_its_first_step_to_its_last(sources: dict[str, Path], tmp_path: Path) -> None:
    config = mixed_config(sources, tmp_path, None, carry=True, batch=10, micro=10, steps=12, shuffle=False)
    dataset = open_dataset(config)
    assert isinstance(dataset, TokenDataset)
    names = [[dataset.place(step * 10 + row)[0].name for row in range(10)] for step in range(12)]
    assert names == [names[0]] * 12 and {n: names[0].count(n) for n in sources} == {"web": 4, "code": 2, "books": 4}
    read = [step[0] for step in loader(dataset, make_plan(config, world_size=1))]
    for row, name in enumerate(names[0]):
        steps = dataset.sources[name].sequences_total // names[0].count(name)
        for step in range(min(steps, 12) - 1):  # the last label is the first token of the next batch
            assert read[step].labels[row, -1] == read[step + 1].tokens[row, 0]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (5, 2)])
def test_rows_of_several_sources_do_not_depend_on_ranks(
    sources: dict[str, Path], tmp_path: Path, ranks: int, workers: int
) -> None:
    config = mixed_config(sources, tmp_path, None, carry=True, batch=10, micro=1, workers=workers)
    one = mixed_config(sources, tmp_path, None, carry=True, batch=10, micro=5)
    assert global_batches(config, ranks, 7) == global_batches(one, 1)[7:]
