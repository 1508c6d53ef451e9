"""Each rank's rows of each global batch, read ahead by worker processes.

A step's rows are a contiguous slice per data rank, cut into micro-batches in order; workers take whole steps. So
the global batch does not depend on ranks, workers or micro-batches, and a resume only names its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from titans_train.data.cursor import Cursor
from titans_train.data.dataset import TokenDataset
from titans_train.data.errors import DataError
from titans_train.data.readers import Readers, out_of_signals, start_worker, worker_context
from titans_train.data.synthetic import SyntheticDataset

if TYPE_CHECKING:
    from titans_train.config.schema import Data
    from titans_train.plan import Plan

_STEPS_AHEAD = 2  # per worker


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens, labels [b, L] int64, document_starts [b, L] bool or None, sequence numbers [b].

    L: of whole sequences, or of the shard of them that a rank asked for.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None
    sample_ids: list[int]

    def pin_memory(self) -> Batch:
        """torch's DataLoader calls this where a GPU is present."""
        starts = self.document_starts.pin_memory() if self.document_starts is not None else None
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory(), starts, self.sample_ids)


def collect(
    dataset: TokenDataset | SyntheticDataset, numbers: list[int], begin: int = 0, end: int | None = None
) -> Batch:
    """Positions [begin, end) of these sequences as one micro-batch."""
    found = dataset.sequences(numbers, begin, end)
    return Batch(found.tokens, found.labels, found.document_starts, numbers)


@dataclass(frozen=True)
class _RankSteps(TorchDataset[Any]):
    """Map-style: item k is the micro-batches of step start + k for one rank, or the error that met it."""

    dataset: TokenDataset | SyntheticDataset
    cursor: Cursor
    micro_batch_size: int
    rank: int
    ranks: int
    start: int
    steps: int
    begin: int  # of each sequence, the positions [begin, end)
    end: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, item: int) -> list[Batch] | DataError:
        numbers = list(self.cursor.batch(self.start + item))
        share = len(numbers) // self.ranks
        mine = numbers[self.rank * share : (self.rank + 1) * share]
        micro = [mine[first : first + self.micro_batch_size] for first in range(0, share, self.micro_batch_size)]
        try:
            return [collect(self.dataset, rows, self.begin, self.end) for rows in micro]
        except DataError as error:
            return error  # raised by the rank itself, so that a worker's error reads the same as its own


def loader(
    dataset: TokenDataset | SyntheticDataset,
    plan: Plan,
    data_rank: int = 0,
    start_step: int = 0,
    cursor: Cursor | None = None,
    shard: int = 0,
) -> Iterator[list[Batch]]:
    """Steps start_step .. training.steps - 1, each as this rank's micro-batches in accumulation order.

    `cursor`: where each step begins; None: the batch size was always that of the plan. `shard`: which of the plan's
    sequence shards this rank holds; only that part of each sequence is read.

    DataError, as the dataset raises it, or where a reader process dies or hangs. ValueError when the global batch does
    not divide over ranks and micro-batches.
    """
    training, ranks, shards = plan.config.training, plan.data_parallel, plan.config.parallel.sequence
    if not 0 <= data_rank < ranks:
        raise ValueError(f"data rank {data_rank} is not among the {ranks} data-parallel ranks of the plan")
    if training.global_batch_size % (ranks * training.micro_batch_size):
        raise ValueError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of data-parallel ranks {ranks} "
            f"* training.micro_batch_size {training.micro_batch_size}; change one of them"
        )
    length = training.sequence_length // shards
    steps = _RankSteps(
        dataset=dataset,
        cursor=cursor or Cursor.constant(training.global_batch_size),
        micro_batch_size=training.micro_batch_size,
        rank=data_rank,
        ranks=ranks,
        start=start_step,
        steps=max(training.steps - start_step, 0),
        begin=shard * length,
        end=(shard + 1) * length,
    )
    return _read(steps, plan.config.data)


def _read(steps: _RankSteps, data: Data) -> Iterator[list[Batch]]:
    """Worker w reads steps w, w + workers, ...; torch's DataLoader puts them back in order."""
    items = _start(steps, data)
    readers = Readers(items, data.timeout_seconds) if data.workers else None
    try:
        if readers is not None:
            del items  # the readers' thread ends them
            steps.dataset.readers_started()
        for _ in range(len(steps)):
            item = next(items) if readers is None else readers.next()
            if isinstance(item, DataError):
                raise item
            yield item
    finally:
        if readers is not None:
            readers.end()


def _start(steps: _RankSteps, data: Data) -> Iterator[Any]:
    reading: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=data.workers,
        multiprocessing_context=worker_context() if data.workers else None,
        prefetch_factor=_STEPS_AHEAD if data.workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
    )
    try:
        with out_of_signals():
            return iter(reading)
    except (OSError, EOFError) as error:
        raise DataError(
            f"data.workers {data.workers} reader processes cannot start ({error}); free memory or raise the limits of "
            "processes and open files (ulimit -u, ulimit -n), or set data.workers to 0, which reads in the rank itself"
        ) from error


def _as_it_is(item: Any) -> Any:
    return item
