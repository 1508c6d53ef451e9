"""Loss over the sequences of a dataset, in one process."""

from __future__ import annotations

import math
from typing import Any

import torch

from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.data.sample import IGNORE


@torch.inference_mode()
def evaluate(
    model: Any, dataset: TokenDataset | SyntheticDataset, sequences: int | None = None, batch: int = 8
) -> dict[str, float]:
    """Over the first `sequences` (None: all): loss in nats per token, perplexity, bits per byte of text, accuracy.

    accuracy: share of labelled positions whose likeliest token is the label.
    """
    count = dataset.sequences_total if sequences is None else min(sequences, dataset.sequences_total)
    loss_sum, right, tokens = 0.0, 0, 0
    for first in range(0, count, batch):
        samples = [dataset.sequence(n) for n in range(first, min(first + batch, count))]
        labels = torch.stack([s.labels for s in samples])
        starts = [s.document_starts for s in samples if s.document_starts is not None]
        logits = model(
            torch.stack([s.tokens for s in samples]), document_starts=torch.stack(starts) if starts else None
        ).logits
        loss_sum += float(model.parts.cross_entropy_sum(logits.flatten(0, 1), labels.flatten()))
        counted = labels != IGNORE
        right += int((logits.argmax(-1) == labels)[counted].sum())
        tokens += int(counted.sum())
    loss = loss_sum / max(tokens, 1)
    figures = {
        "loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": right / max(tokens, 1),
        "tokens": tokens, "sequences": count,
    }  # fmt: skip
    if dataset.bytes_per_token:
        figures["bits_per_byte"] = loss / math.log(2) / dataset.bytes_per_token
    return figures
