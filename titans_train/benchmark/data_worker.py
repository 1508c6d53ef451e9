"""One measurement of `benchmark data` in a process of its own; prints its figures as a line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from titans_train.config.schema import Data, Model, Run, RunConfig, Training
from titans_train.data import TokenDataset, loader, open_dataset
from titans_train.data.loader import collect
from titans_train.plan import make_plan

LENGTH, BATCH = 2048, 8
DOCUMENT_BYTES = 1000
_WARM_SECONDS = 2.0


def dataset_of(prepared: str, cache: str, workers: int = 0, length: int = LENGTH) -> tuple[RunConfig, TokenDataset]:
    config = RunConfig(
        run=Run(name="benchmark"),
        model=Model(block="transformer", layers=1, width=16, heads=2, vocabulary=257),
        data=Data(path=prepared, cache=cache, workers=workers),
        training=Training(steps=10**9, sequence_length=length, global_batch_size=BATCH, micro_batch_size=BATCH),
    )
    dataset = open_dataset(config)
    assert isinstance(dataset, TokenDataset)
    return config, dataset


def place_of(dataset: TokenDataset, number: int) -> int:
    """Which of the first epoch's packed sequences is read as `number`."""
    stream, place = dataset.place(number)
    return int(stream._places(np.array([place]))[1][0])


def flatten(prepared: str, flat: str) -> dict[str, Any]:
    """Writes the first epoch's stream of tokens as plain uint16, so that packed sequence i is a slice of it."""
    _, dataset = dataset_of(prepared, f"{flat}.cache")
    rows: list[Any] = [None] * dataset.sequences_total
    for number in range(dataset.sequences_total):
        sample = dataset.sequence(number)
        rows[place_of(dataset, number)] = sample.tokens.numpy().astype(np.uint16)
        last = sample.labels[-1:].numpy().astype(np.uint16)
        if place_of(dataset, number) == dataset.sequences_total - 1:
            end = last
    np.concatenate([*rows, end]).tofile(flat)
    return {"sequences": dataset.sequences_total}


def plain(flat: str, dataset: TokenDataset) -> Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]]:
    """Batches of a memory-mapped file, as small trainers read them."""
    tokens = np.memmap(flat, np.uint16, "r")

    def batch(places: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        windows = [torch.from_numpy(tokens[p * LENGTH : (p + 1) * LENGTH + 1].astype(np.int64)) for p in places]
        return torch.stack([w[:-1] for w in windows]), torch.stack([w[1:] for w in windows])

    return batch


def _speed(action: Callable[[list[int]], Any], batches: list[list[int]]) -> tuple[float, float]:
    """(tokens per CPU second, per second)."""
    cpu, wall = time.process_time(), time.perf_counter()
    for numbers in batches:
        action(numbers)
    tokens = len(batches) * BATCH * LENGTH
    return tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - wall)


def _batches(dataset: TokenDataset) -> tuple[list[list[int]], list[list[int]]]:
    """The first epoch's batches, as numbers of the run and as places in the packed stream."""
    whole = dataset.sequences_total // BATCH * BATCH
    numbers = [list(range(first, first + BATCH)) for first in range(0, whole, BATCH)]
    return numbers, [[place_of(dataset, n) for n in row] for row in numbers]


def warm(prepared: str, flat: str, cache: str) -> dict[str, float]:
    """Everything was read once before. The two take turns."""
    _, dataset = dataset_of(prepared, cache)
    numbers, places = _batches(dataset)
    batch = plain(flat, dataset)
    for row, at in zip(numbers, places, strict=True):
        ours, theirs = collect(dataset, row), batch(at)
        assert torch.equal(ours.tokens, theirs[0]) and torch.equal(ours.labels, theirs[1])
    found: list[tuple[float, float, float, float]] = []
    until = time.perf_counter() + _WARM_SECONDS
    while time.perf_counter() < until or len(found) < 3:
        found.append((*_speed(lambda row: collect(dataset, row), numbers), *_speed(batch, places)))
    ours, ours_wall, numpy, numpy_wall = np.median(np.array(found), axis=0).tolist()
    return {"ours": ours, "ours_wall": ours_wall, "numpy": numpy, "numpy_wall": numpy_wall}


def cold(prepared: str, flat: str, cache: str) -> dict[str, float]:
    """No shard is decompressed or checked, no file is in the page cache."""
    for path in [*Path(prepared).rglob("*"), Path(flat)]:
        if path.is_file():
            _forget(path)
    _, dataset = dataset_of(prepared, cache)
    numbers, places = _batches(dataset)
    ours, ours_wall = _speed(lambda row: collect(dataset, row), numbers)
    numpy, numpy_wall = _speed(plain(flat, dataset), places)
    return {"ours": ours, "ours_wall": ours_wall, "numpy": numpy, "numpy_wall": numpy_wall}


def _forget(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fdatasync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def start(prepared: str, cache: str, workers: str) -> dict[str, float]:
    """Seconds; Python and torch are imported already, except in reader processes."""
    begun = time.perf_counter()
    config, dataset = dataset_of(prepared, cache, int(workers))
    opened = time.perf_counter()
    reading = loader(dataset, make_plan(config, 1))
    next(reading)
    ready = time.perf_counter()
    shards = len(dataset.sources["data"].store.documents_per_shard)
    return {"shards": shards, "open": opened - begun, "batch": ready - begun}


def resident(prepared: str, cache: str, count: str) -> dict[str, Any]:
    """Resident memory after so many batches, in MiB."""
    _, dataset = dataset_of(prepared, cache, length=512)
    points, total = [], int(count)
    for step in range(total + 1):
        if step % max(total // 20, 1) == 0:
            points.append((step, _resident_mib()))
        collect(dataset, list(range(step * BATCH, (step + 1) * BATCH)))
    shards = len(dataset.sources["data"].store.documents_per_shard)
    return {
        "batches": total, "epochs": total * BATCH / dataset.sequences_total, "shards": shards, "resident_mib": points
    }  # fmt: skip


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "flatten": flatten, "warm": warm, "cold": cold, "start": start, "resident": resident,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(MEASUREMENTS[sys.argv[1]](*sys.argv[2:])))
