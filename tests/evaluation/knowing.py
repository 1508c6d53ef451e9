"""A model whose next token is known."""

from __future__ import annotations

import torch

from tests.models.shapes import tiny
from titans_train.models import LanguageModel


def knowing(block: str) -> LanguageModel:
    """A model that says a space after a colon, and an "a" after a space."""
    torch.manual_seed(0)
    model = LanguageModel(tiny(block, vocabulary=257, tied_head=False)).double().eval()
    embedding, head = (model.get_parameter(f"{name}.weight") for name in ("embedding", "head"))
    with torch.no_grad():
        embedding.mul_(1000)  # what blocks add to it does not count
        head.zero_()
        head[ord(" ")], head[ord("a")] = embedding[ord(":")], embedding[ord(" ")]
    return model
