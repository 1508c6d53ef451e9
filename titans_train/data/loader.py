"""Each rank's rows of each global batch, read ahead by worker processes.

A step's rows are a contiguous slice per data rank, cut into micro-batches in order; workers take whole steps. So
the global batch does not depend on ranks, workers or micro-batches, and a resume only names its first step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from titans_train.data.dataset import TokenDataset
from titans_train.data.errors import DataError
from titans_train.data.recall import RecallDataset
from titans_train.data.sample import Sample

if TYPE_CHECKING:
    from titans_train.plan import Plan

_STEPS_AHEAD = 2  # per worker


@dataclass(frozen=True)
class Batch:
    """One micro-batch: tokens, labels [b, L] int64, document_starts [b, L] bool or None, sequence numbers [b].

    continues [b] bool: the row goes on where it ended in the global batch before; None without carry_state.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None
    sample_ids: list[int]
    continues: torch.Tensor | None = None

    def pin_memory(self) -> Batch:
        """torch's DataLoader calls this where a GPU is present."""
        starts = self.document_starts.pin_memory() if self.document_starts is not None else None
        continues = self.continues.pin_memory() if self.continues is not None else None
        return Batch(self.tokens.pin_memory(), self.labels.pin_memory(), starts, self.sample_ids, continues)


@dataclass(frozen=True)
class _RankSteps(TorchDataset[Any]):
    """Map-style: item k is the micro-batches of step start + k for one rank, or the error that met it."""

    dataset: TokenDataset | RecallDataset
    global_batch_size: int
    micro_batch_size: int
    rank: int
    ranks: int
    start: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, item: int) -> list[Batch] | DataError:
        numbers = self.dataset.indices(self.start + item, self.global_batch_size)
        share = self.global_batch_size // self.ranks
        mine = numbers[self.rank * share : (self.rank + 1) * share]
        size = self.micro_batch_size
        try:
            return [self._batch(mine[first : first + size]) for first in range(0, share, size)]
        except DataError as error:
            return error  # raised by the rank itself, so that a worker's error reads the same as its own

    def _batch(self, numbers: list[int]) -> Batch:
        samples: list[Sample] = [self.dataset.sequence(number) for number in numbers]
        starts = [sample.document_starts for sample in samples if sample.document_starts is not None]
        continues = [sample.continues for sample in samples if sample.continues is not None]
        return Batch(
            tokens=torch.stack([sample.tokens for sample in samples]),
            labels=torch.stack([sample.labels for sample in samples]),
            document_starts=torch.stack(starts) if starts else None,
            sample_ids=numbers,
            continues=torch.tensor(continues) if continues else None,
        )


def loader(
    dataset: TokenDataset | RecallDataset, plan: Plan, data_rank: int = 0, start_step: int = 0
) -> Iterator[list[Batch]]:
    """Steps start_step .. training.steps - 1, each as this rank's micro-batches in accumulation order.

    DataError, as the dataset raises it. ValueError when the global batch does not divide over ranks and micro-batches.
    """
    training, ranks = plan.config.training, plan.data_parallel
    if not 0 <= data_rank < ranks:
        raise ValueError(f"data rank {data_rank} is not among the {ranks} data-parallel ranks of the plan")
    if training.global_batch_size % (ranks * training.micro_batch_size):
        raise ValueError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of data-parallel ranks {ranks} "
            f"* training.micro_batch_size {training.micro_batch_size}; change one of them"
        )
    steps = _RankSteps(
        dataset=dataset,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        rank=data_rank,
        ranks=ranks,
        start=start_step,
        steps=max(training.steps - start_step, 0),
    )
    return _read(steps, plan.config.data.workers)


def _read(steps: _RankSteps, workers: int) -> Iterator[list[Batch]]:
    """Worker w reads steps w, w + workers, ...; torch's DataLoader puts them back in order."""
    reading: DataLoader[Any] = DataLoader(
        steps,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=_worker_context() if workers else None,
        prefetch_factor=_STEPS_AHEAD if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for item in reading:
        if isinstance(item, DataError):
            raise item
        yield item


def _worker_context() -> BaseContext:
    """Workers are forked from a clean process that has imported what they need once.

    Forking the rank itself would copy its communication threads' locks; spawning would import torch and streaming
    again in every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["titans_train.data.preload"])
    return context


def _as_it_is(item: Any) -> Any:
    return item
