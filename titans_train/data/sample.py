"""One training sequence, as the model's forward takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100  # label of a position that has no loss


@dataclass(frozen=True)
class Sample:
    """One sequence: tokens [L] int64, labels [L] int64 (the next token, or -100), document_starts [L] bool or None.

    `document_starts` is None where documents are not isolated from each other. `continues`: whether the sequence goes
    on where its row of the global batch before ended; None where rows do not carry.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None
    continues: bool | None = None
