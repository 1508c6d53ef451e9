"""A model whose next token is known."""

from __future__ import annotations

import torch

from tests.models.shapes import tiny
from titans_train.models import LanguageModel


def knowing(block: str) -> LanguageModel:
    """A model that says a space after a colon, and an "a" after a space."""
    torch.manual_seed(0)
    model = LanguageModel(tiny(block, vocabulary=257, tied_head=False)).double().eval()
    assert model.head is not None
    with torch.no_grad():
        model.embedding.weight.mul_(1000)
        model.head.weight.zero_()
        model.head.weight[ord(" ")] = model.embedding.weight[ord(":")]
        model.head.weight[ord("a")] = model.embedding.weight[ord(" ")]
    return model
