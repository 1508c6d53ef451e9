"""Loss over the sequences of a dataset, and how it falls with the position in the context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from titans_train.data import Sample, SyntheticDataset, TokenDataset
from titans_train.evaluation.scoring import Scorer, position_sums


def evaluate(scorer: Scorer, dataset: TokenDataset | SyntheticDataset, sequences: int | None = None) -> dict[str, Any]:
    """Over the first `sequences` (None: all): loss in nats per token, perplexity, bits per byte of text, accuracy.

    accuracy: share of labelled positions whose likeliest token is the label. by_position: the same over stretches of
    the context, each twice as long as the one before, as {first, last, tokens, loss, accuracy}. On every rank alike.
    """
    count = dataset.sequences_total if sequences is None else min(sequences, dataset.sequences_total)

    def sample(numbers: Sequence[int]) -> Sample:
        return dataset.sequences(list(numbers))

    sums = position_sums(scorer, count, sample, dataset.length)
    tokens, right, total = sums.sum(0).tolist()
    loss = total / max(tokens, 1)
    figures: dict[str, Any] = {
        "loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": right / max(tokens, 1),
        "tokens": int(tokens), "sequences": count,
    }  # fmt: skip
    if dataset.bytes_per_token:
        figures["bits_per_byte"] = loss / math.log(2) / dataset.bytes_per_token
    return figures | {"by_position": by_position(sums)}


def stretches(length: int) -> list[tuple[int, int]]:
    """[first, end) of stretches of a context: 0 to 15, 16 to 31, 32 to 63, and so on."""
    edges = [0, 16]
    while edges[-1] < length:
        edges.append(2 * edges[-1])
    return [(a, min(b, length)) for a, b in pairwise(edges) if a < length]


def by_position(sums: Tensor) -> list[dict[str, Any]]:
    """sums [L, 3] of `position_sums`; stretches without a label are left out."""
    found = []
    for first, end in stretches(len(sums)):
        tokens, right, total = sums[first:end].sum(0).tolist()
        if tokens:
            mean = {"loss": total / tokens, "accuracy": right / tokens}
            found.append({"first": first, "last": end - 1, "tokens": int(tokens), **mean})
    return found
