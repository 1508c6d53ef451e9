"""Reading by pieces is reading token by token: every block, every peer's rule, logits and state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inference.test_generate import build
from titans_train.inference import Reading, read
from titans_train.models.tree import map_tensors, tensors_of
from titans_train.shape import BLOCKS, PEERS

RULES = tuple(f"lmm-{rule}" for rule in PEERS) + tuple(f"{block}-{rule}" for block in ("mag", "mal") for rule in PEERS)
TOKENS = torch.randint(0, 256, (45,), generator=torch.Generator().manual_seed(3)).tolist()
PIECES = (1, 5, 4, 13, 2, 8, 12)  # chunks are of 4, segments of 8, windows of 6


def apart(a: Any, b: Any) -> float:
    """Largest difference of two states' tensors. The states have the same parts and counts, else an error."""
    assert map_tensors(torch.zeros_like, a).__repr__() == map_tensors(torch.zeros_like, b).__repr__()
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)


@pytest.mark.parametrize("block", (*BLOCKS, *RULES))
@torch.inference_mode()
def test_reading_by_pieces_is_reading_token_by_token(block: str) -> None:
    model = build(block)
    single, each = None, []
    for token in TOKENS:
        single = read(model, [token], single)
        each.append(single.logits)
    assert single is not None
    pieces: Reading | None = None
    state, logits, first = None, [], 0
    for size in PIECES:
        piece = TOKENS[first : first + size]
        pieces = read(model, piece, pieces)
        output = model(torch.tensor([piece]), state=state, return_state=True)
        state, first = output.state, first + size
        logits.append(output.logits[0])
        assert apart(pieces.state, state) < 1e-10
    assert first == len(TOKENS) and pieces is not None
    whole = read(model, TOKENS)
    expected = torch.stack(each)
    assert float(expected.std()) > 0.05 and float((expected[1:] - expected[:-1]).abs().max()) > 0.05
    found: Tensor = torch.cat(logits)
    assert (found - expected).abs().max() < 1e-10
    for reading in (pieces, whole):
        assert (reading.logits - expected[-1]).abs().max() < 1e-10
        assert apart(reading.state, single.state) < 1e-10
