"""Loss over the sequences of a dataset, and how it falls with the position in the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from titans_train.data import Sample, SyntheticDataset, TokenDataset
from titans_train.evaluation.intervals import clustered
from titans_train.evaluation.scoring import Scorer, case_and_position_sums
from titans_train.parallel import Mesh, sum_over_data
from titans_train.parallel.launch import device


def evaluate(scorer: Scorer, dataset: TokenDataset | SyntheticDataset, sequences: int | None = None) -> dict[str, Any]:
    """Over the first `sequences` (None: all): loss in nats per token, perplexity, bits per byte of text, accuracy.

    accuracy: share of labelled positions whose likeliest token is the label; of a synthetic task, whose sequences are
    drawn at random, also the 95 % interval accuracy_low to accuracy_high. by_position: the same over stretches of
    the context, each twice as long as the one before, as {first, last, tokens, loss, accuracy}. bytes: of the text that
    the labels stand for; where the tokenizer does not tell, bytes_by_average: by the mean of the whole split. On every
    rank alike.
    """
    count = dataset.sequences_total if sequences is None else min(sequences, dataset.sequences_total)
    sizes = torch.zeros(count, 2, dtype=torch.float64)  # of each sequence: bytes of its labels, times counted

    def sample(numbers: Sequence[int]) -> Sample:
        given = dataset.sequences(list(numbers))
        if isinstance(dataset, TokenDataset):
            own = torch.tensor(dataset.text_bytes(given), dtype=torch.float64)
            sizes[list(numbers)] = torch.stack([own, torch.ones_like(own)], 1)
        return given

    cases, positions = case_and_position_sums(scorer, count, sample, dataset.length)
    tokens, right, total = positions.sum(0).tolist()
    loss = total / max(tokens, 1)
    figures: dict[str, Any] = {
        "loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": right / max(tokens, 1),
        "tokens": int(tokens), "sequences": count,
    }  # fmt: skip
    if dataset.bytes_per_token:
        size = _counted(sizes, scorer.mesh)
        exact = math.isfinite(size)
        size = size if exact else tokens * dataset.bytes_per_token
        figures["bits_per_byte"] = total / math.log(2) / max(size, 1)
        figures |= {"bytes": round(size)} if exact else {"bytes_by_average": size}
    if isinstance(dataset, SyntheticDataset):
        figures["accuracy_low"], figures["accuracy_high"] = clustered(cases[:, 1].tolist(), cases[:, 0].tolist())
    return figures | {"by_position": by_position(positions)}


def _counted(sizes: Tensor, mesh: Mesh) -> float:
    """Bytes of all sequences; NaN if those of one are not known. A sequence is read by several ranks, by each alike."""
    size, times = sum_over_data(sizes.to(device()), mesh).unbind(1)
    return float((size / times).sum())


def stretches(length: int) -> list[tuple[int, int]]:
    """[first, end) of stretches of a context: 0 to 15, 16 to 31, 32 to 63, and so on."""
    edges = [0, 16]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(a, min(b, length)) for a, b in pairwise(edges) if a < length]


def by_position(sums: Tensor) -> list[dict[str, Any]]:
    """sums: [L, 3] of `case_and_position_sums`; stretches without a label are left out."""
    found = []
    for first, end in stretches(len(sums)):
        tokens, right, total = sums[first:end].sum(0).tolist()
        if tokens:
            mean = {"loss": total / tokens, "accuracy": right / tokens}
            found.append({"first": first, "last": end - 1, "tokens": int(tokens), **mean})
    return found
