"""Training sequences, as the model's forward takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORE = -100  # label of a position that has no loss


@dataclass(frozen=True)
class Sample:
    """Sequences or parts of them: tokens [n, L] int64, labels [n, L] int64 (the next token, or -100), document_starts
    [n, L] bool or None; of one sequence [L].

    `document_starts` is None where documents are not isolated from each other and rows do not carry. Where rows carry,
    a start says that nothing of the batch before goes on here.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    document_starts: torch.Tensor | None

    def __getitem__(self, row: int) -> Sample:
        starts = None if self.document_starts is None else self.document_starts[row]
        return Sample(self.tokens[row], self.labels[row], starts)

    @classmethod
    def join(cls, parts: Sequence[Sample], order: Sequence[int]) -> Sample:
        """All rows of `parts`, the k-th of which comes at place order[k]."""
        places = torch.tensor(order).argsort()
        starts = [part.document_starts for part in parts if part.document_starts is not None]
        return cls(
            torch.cat([part.tokens for part in parts])[places],
            torch.cat([part.labels for part in parts])[places],
            torch.cat(starts)[places] if starts else None,
        )
