"""Which token comes next: temperature, top-k, top-p, min-p and the repetition penalty, for one text or many at once.

Shapes: B rows (texts), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_train.errors import UserError


@dataclass(frozen=True)
class Sampler:
    """The likeliest token at temperature 0, else one drawn from the tokens that every option keeps.

    In this order: the repetition penalty (CTRL, arXiv 1909.05858) on the logits, the temperature, then top-k, top-p
    among what that leaves, and min-p (arXiv 2407.01082). UserError for a value that cannot be.
    """

    temperature: float = 0.8
    top_p: float = 1.0  # the smallest set of the likeliest tokens with this probability together
    vocabulary: int | None = None  # ids from here on are padding and never drawn
    top_k: int | None = None  # so many of the likeliest tokens
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest one
    repetition_penalty: float = 1.0  # logits of tokens already in the text are divided by it (negative: multiplied)

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top-p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top-k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "min-p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition-penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 is none, 1.2 is usual"),
        }
        for name, (possible, range_) in allowed.items():
            if not possible:
                raise UserError(f"{name} is {getattr(self, name.replace('-', '_'))}; it is {range_}")

    def draw(self, logits: Tensor, generator: torch.Generator, seen: Tensor | None = None) -> int:
        """logits: [V], seen: [V] bool, the tokens already in the text -> a token id. UserError: logits not finite."""
        return self.draw_rows(logits[None], [generator], None if seen is None else seen[None])[0]

    def draw_rows(self, logits: Tensor, generators: Sequence[torch.Generator], seen: Tensor | None = None) -> list[int]:
        """logits: [B, V], seen: [B, V] bool -> B token ids, each by the random numbers of its own row."""
        logits = self._penalised(logits, seen)
        if self.temperature < torch.finfo(torch.float32).tiny:  # a CPU may take it for zero
            return [int(token) for token in logits.argmax(-1)]
        # Less the largest: a tiny temperature then gives 0 and -inf, not inf.
        scaled = (logits - logits.max(-1, keepdim=True).values) / self.temperature
        probabilities, order = scaled.softmax(-1).sort(stable=True, dim=-1, descending=True)
        if self.top_k is not None:
            probabilities[:, self.top_k :] = 0
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        kept &= probabilities >= self.min_p * probabilities[:, :1]
        weights = probabilities * kept
        picked = [torch.multinomial(row, 1, generator=g) for row, g in zip(weights, generators, strict=True)]
        return [int(row[place]) for row, place in zip(order, picked, strict=True)]

    def _penalised(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))[:, : self.vocabulary]
        if not bool(logits.isfinite().all()):
            raise UserError("the model's logits are not finite: it has diverged; use an earlier checkpoint")
        if seen is None or self.repetition_penalty == 1:
            return logits
        less = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
        return torch.where(seen[:, : self.vocabulary], less, logits)
