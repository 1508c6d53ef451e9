"""Validation loss over a fixed set of sequences, shared out over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.data.loader import collect
from titans_train.data.sample import IGNORE
from titans_train.models.parts import Parts
from titans_train.parallel import Engine, Mesh, sum_over_data
from titans_train.parallel.launch import device
from titans_train.training.step import forward


def validate(
    engine: Engine,
    dataset: TokenDataset | SyntheticDataset,
    sequences: int,
    micro_batch: int,
    mesh: Mesh,
    beat: Callable[[], object],
) -> dict[str, float]:
    """Over the first `sequences` of the dataset: loss (nats per token), perplexity, and bits per byte of text.

    Every rank runs the same number of forwards, since a sharded model needs all ranks in each; a rank with fewer
    sequences repeats one and does not count it. Micro-batches are always full: ranks may share their tokens evenly.
    `beat` is called before each.
    """
    count = min(sequences, dataset.sequences_total)
    share = -(-count // mesh.data)
    totals = torch.zeros(2, dtype=torch.float64, device=device())
    engine.model.eval()
    parts: Parts = engine.model.parts  # type: ignore[assignment]
    length = dataset.length // mesh.sequence
    shard = (mesh.sequence_rank * length, (mesh.sequence_rank + 1) * length)
    with torch.no_grad():
        for first in range(0, share, micro_batch):
            beat()
            within = range(first, first + micro_batch)
            numbers = [mesh.data_rank * share + i if i < share else count for i in within]
            batch = collect(dataset, [min(n, count - 1) for n in numbers], *shard)
            batch.labels[torch.tensor([n >= count for n in numbers])] = IGNORE
            totals[0] += forward(engine, batch)[0].double()
            parts.finish()
            totals[1] += int((batch.labels != IGNORE).sum())
    engine.model.train()
    loss_sum, tokens = sum_over_data(totals, mesh).tolist()
    loss = loss_sum / max(tokens, 1)
    figures = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700)), "validation_tokens": tokens}
    if dataset.bytes_per_token:
        figures["validation_bits_per_byte"] = loss / math.log(2) / dataset.bytes_per_token
    return figures
