"""One training sequence, as the model's forward takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100  # label of a position that has no loss


@dataclass(frozen=True)
class Sample:
    """A sequence or part of one: tokens [L] int64, labels [L] int64 (the next token, or -100), document_starts [L]
    bool or None.

    `document_starts` is None where documents are not isolated from each other and rows do not carry. Where rows carry,
    a start says that nothing of the batch before goes on here.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None
