"""The verb `show-data`: a global batch in words, as the model sees it, with the borders of its documents."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.tokenizer import Tokenizer
from titans_train.data.cursor import Cursor, check_goes_on, read_cursor
from titans_train.data.dataset import TokenDataset, open_dataset, tokenizer_of_data
from titans_train.data.sample import IGNORE
from titans_train.data.source import SourceStream
from titans_train.errors import UserError

if TYPE_CHECKING:
    from titans_train.config.schema import RunConfig


def main(args: Sequence[str]) -> int:
    from titans_train.config import load_config
    from titans_train.plan import resolve_shape

    parser = argparse.ArgumentParser(prog="python -m titans_train show-data", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--step", type=int, default=1, help="which optimiser step's batch, counted from 1")
    parser.add_argument("--rows", type=int, help="show the first so many rows (default: all)")
    parser.add_argument("--characters", type=int, default=400, help="of each document's text (default: 400; 0: all)")
    options = parser.parse_intermixed_args(list(args))
    config = load_config(options.config, options.overrides)
    if options.step < 1:
        raise UserError(f"--step is {options.step}; the first step is 1")
    if options.rows is not None and options.rows < 1:
        raise UserError(f"--rows is {options.rows}; it is at least 1")
    dataset = open_dataset(config, "train", resolve_shape(config).document_alignment)
    if not isinstance(dataset, TokenDataset):
        raise UserError(
            "data.source is recall, whose tokens stand for no text; choose a config with data.source shards"
        )
    cursor = _cursor(config, dataset, options.step)
    numbers = cursor.batch(options.step - 1)
    shown = numbers if options.rows is None else numbers[: options.rows]
    print(f"step {options.step}: sequences {numbers.start} to {numbers.stop - 1} of the run, {len(shown)} shown")
    for line in lines(dataset.at(cursor), shown, tokenizer_of_data(config), options.characters):
        print(line)
    return 0


def _cursor(config: RunConfig, dataset: TokenDataset, step: int) -> Cursor:
    """Of the run's newest checkpoint, since its batch size may have changed; else as if it began now.

    DataError where the config says other data or weights than the run has read.
    """
    size = config.training.global_batch_size
    from titans_train.training.manifest import read_manifest

    folder = Path(config.run.folder) / config.run.name / "checkpoints"
    checkpoints = sorted(folder.glob("step-????????/manifest.json"))
    if not checkpoints:
        return Cursor.constant(size)
    state = read_manifest(checkpoints[-1].parent)
    trained, found = int(state["step"]), state["data"]
    check_goes_on(found, dataset.weights, dataset.fingerprints, trained, str(checkpoints[-1].parent))
    return read_cursor(found).going_on(trained, size) if step > trained else read_cursor(found)


def lines(dataset: TokenDataset, numbers: Sequence[int], tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    """Text of these sequences; of each document at most so many characters, 0 for all."""
    for row, number in enumerate(numbers):
        stream, place = dataset.place(number)
        yield ""
        yield (
            f"row {row}: sequence {number}, of source {stream.name} (its sequence {place}, "
            f"epoch {place // stream.sequences_total + 1})"
        )
        yield from _sequence(stream, place, tokenizer, characters)


def _sequence(stream: SourceStream, place: int, tokenizer: Tokenizer, characters: int) -> Iterator[str]:
    sample, pieces = stream.sequences([place])[0], stream.pieces([place])
    columns = (pieces.position, pieces.document, pieces.begin, pieces.end, pieces.length)
    for first, document, begin, end, length in zip(*(column.tolist() for column in columns), strict=True):
        last = min(first + end - begin, len(sample.tokens))
        if last <= first:
            continue  # only a label
        begins, ends = "begins" if begin == 0 else "goes on", ", ends" if begin + last - first == length else ""
        afresh = sample.document_starts is not None and bool(sample.document_starts[first])
        yield (
            f"  [{first}, {last}) {stream.store.name(document)}: {begins}{ends} (tokens {begin} to "
            f"{begin + last - first - 1} of {length}){', the model starts afresh' if afresh else ''}"
        )
        text = tokenizer.decode(sample.tokens[first:last].tolist())
        cut = text if characters == 0 or len(text) <= characters else f"{text[:characters]} …"
        yield from (f"    | {line}" for line in cut.splitlines())
    unlabelled = int((sample.labels == IGNORE).sum())
    if unlabelled:
        yield f"  {unlabelled} of {len(sample.labels)} positions have no label (padding and documents' ends)"
