"""Texts whose last tokens are asked for, of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from titans_train.data.sample import IGNORE, Sample

Case = tuple[NDArray[np.int64], int]  # tokens [L], L >= 2, and how many of the last are asked for


def padded(cases: Sequence[Case]) -> Sample:
    """Tokens and labels [n, L - 1] of texts of up to L tokens; what fills up shorter ones stands behind their end."""
    length = max(len(tokens) for tokens, _ in cases)
    rows, labels = torch.zeros(len(cases), length - 1, dtype=torch.long), torch.full((len(cases), length - 1), IGNORE)
    for n, (tokens, asked) in enumerate(cases):
        whole, last = torch.from_numpy(tokens), len(tokens) - 1
        rows[n, :last] = whole[:-1]
        labels[n, last - asked : last] = whole[last + 1 - asked :]
    return Sample(rows, labels, None)
