"""model.compile changes how element-wise stretches are computed, not what: outputs and all gradients, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.models import LanguageModel


def results(compiled: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = LanguageModel(tiny("mag", compile=compiled)).double()
    tokens = torch.randint(model.shape.vocabulary, (2, 33))
    starts = torch.zeros(2, 33, dtype=torch.bool)
    starts[1, 16] = True  # at a chunk's border
    out = model(tokens[:, :32], labels=tokens[:, 1:], document_starts=starts[:, :32], return_state=True)
    assert out.loss_sum is not None and out.state is not None
    out.loss_sum.backward()
    return {"loss": out.loss_sum} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_compiled_model_is_the_same_model() -> None:
    """MAG has every stretch but LMM's output gate, which is made of the same functions."""
    torch._dynamo.reset()
    got, want = results(True), results(False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 6  # convolutions, norms, gate, rotation, SwiGLU
    assert got.keys() == want.keys()
    for name, x in got.items():
        error = (x - want[name]).abs().max() / want[name].abs().max().clamp_min(1e-3)
        assert error <= 1e-11, (name, float(error))
