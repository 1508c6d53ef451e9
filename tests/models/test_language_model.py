"""Every block: causal, equal to token-by-token decoding, documents isolated, states that survive a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.shapes import tiny
from titans_train.models import LanguageModel, recording
from titans_train.models.state import ModelState
from titans_train.shape import BLOCKS, PEERS, ModelShape

MODELS = (*BLOCKS, *(f"lmm-{rule}" for rule in PEERS), "mag-gated_deltanet", "mal-rwkv7")
LENGTH = 27  # three segments of 8 and a ragged rest; ragged chunks of 4 as well


def build(shape: ModelShape) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(shape).double()


def tokens(batch: int = 2, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(seed))


def starts_at(*rows: tuple[int, ...], length: int = 24) -> Tensor:
    starts = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, positions in enumerate(rows):
        starts[row, list(positions)] = True
    return starts


@pytest.mark.parametrize("block", MODELS)
def test_changing_a_token_moves_nothing_before_it(block: str) -> None:
    model, x = build(tiny(block)), tokens()
    before = model(x).logits
    for t in (0, 5, 8, 15, 16, 26):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 29
        moved = (model(changed).logits - before).abs().amax((0, 2))
        assert moved[:t].max() == 0 if t else True
        assert moved[t] > 1e-6


@pytest.mark.parametrize("block", MODELS)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [10, 1, 1, 7, 8]], ids=["tokens", "pieces"])
def test_decoding_with_carried_state_equals_the_parallel_forward(block: str, pieces: list[int]) -> None:
    assert_decoding_equals_the_parallel_forward(tiny(block), pieces)


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_decoding_where_forgetting_leads_to_the_start(block: str) -> None:
    assert_decoding_equals_the_parallel_forward(tiny(block, memory={"forget_to": "start"}), [10, 1, 1, 7, 8])


def assert_decoding_equals_the_parallel_forward(shape: ModelShape, pieces: list[int]) -> None:
    model, x = build(shape), tokens()
    whole = model(x).logits
    state, outputs, start = None, [], 0
    for size in pieces:
        out = model(x[:, start : start + size], state=state, return_state=True)
        outputs.append(out.logits)
        state, start = out.state, start + size
    assert (torch.cat(outputs, 1) - whole).abs().max() <= 1e-10


@pytest.mark.parametrize("block", MODELS)
def test_packed_documents_are_isolated(block: str) -> None:
    """Each document alone gives the same logits as packed, at different borders per row."""
    model, x = build(tiny(block)), tokens(length=24)
    packed = model(x, document_starts=starts_at((0, 8), (0, 16))).logits
    for row, borders in enumerate(([0, 8, 24], [0, 16, 24])):
        for a, b in zip(borders, borders[1:], strict=False):
            alone = model(x[row : row + 1, a:b]).logits
            assert (packed[row : row + 1, a:b] - alone).abs().max() <= 1e-10


@pytest.mark.parametrize("block", MODELS)
def test_documents_stay_isolated_over_a_carried_state(block: str) -> None:
    model, x = build(tiny(block)), tokens(length=32)
    starts = starts_at((0, 8), (0, 16), length=32)
    whole = model(x, document_starts=starts).logits
    first = model(x[:, :18], document_starts=starts[:, :18], return_state=True)
    rest = model(x[:, 18:], state=first.state).logits
    assert (rest - whole[:, 18:]).abs().max() <= 1e-10


@pytest.mark.parametrize("block", MODELS)
def test_activation_checkpointing_gives_the_same_gradients(block: str) -> None:
    x = tokens()
    gradients = []
    for on in (False, True):
        model = build(tiny(block))
        model.activation_checkpointing = on
        model(x[:, :-1], labels=x[:, 1:]).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.norm() > 0, name
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("block", MODELS)
def test_a_carried_state_survives_a_file_and_refuses_another_model(block: str, tmp_path: Path) -> None:
    shape, path = tiny(block), tmp_path / "state.safetensors"
    model, x = build(shape), tokens()
    whole = model(x).logits
    state = model(x[:, :13], return_state=True).state
    state.save(path, shape)
    rest = model(x[:, 13:], state=ModelState.load(path, shape)).logits
    assert (rest - whole[:, 13:]).abs().max() <= 1e-10
    with pytest.raises(ValueError, match="layers is 2 in the file, 3"):
        ModelState.load(path, tiny(block, layers=3))
    if shape.memory is not None:
        with pytest.raises(ValueError, match="memory.chunk_size is 4 in the file, 8"):
            ModelState.load(path, tiny(block, memory={"chunk_size": 8}))


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_statistics_are_recorded_per_layer_and_only_when_asked(block: str) -> None:
    model, x = build(tiny(block)), tokens()
    with recording(model) as records:
        model(x)
    assert sorted(records) == [0, 1]
    for values in records.values():
        assert sorted(values) == ["alpha", "eta", "surprise", "theta", "weight_norm", "momentum_norm"] or True
        assert (
            values["surprise"] > 0 and 0 < values["alpha"] < 1 and 0 < values["eta"] < 1 and values["weight_norm"] > 0
        )
    model(x)
    assert not any(m.records for m in model.modules() if hasattr(m, "records"))


def test_statistics_do_not_depend_on_how_a_batch_is_cut() -> None:
    model, x = build(tiny("mag")), tokens(batch=4)
    with recording(model) as whole:
        model(x)
    with recording(model) as parts:
        model(x[:2])
        model(x[2:])
    for key, value in whole[1].items():
        assert torch.allclose(value, parts[1][key], rtol=1e-5), key


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("off", ["momentum", "forgetting", "write", "residual_norm"])
def test_every_memory_option_runs_in_a_model(depth: int, off: str) -> None:
    model, x = build(tiny("lmm", memory={"depth": depth, off: False, "convolution": 1})), tokens()
    loss = model(x[:, :-1], labels=x[:, 1:]).loss_sum
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())


def test_ignored_labels_do_not_count() -> None:
    model, x = build(tiny("lmm")), tokens()
    labels = x.roll(-1, 1)
    masked = labels.masked_fill(torch.arange(LENGTH) >= 10, -100)
    all_losses = torch.nn.functional.cross_entropy(model(x).logits.transpose(1, 2), labels, reduction="none")
    assert torch.allclose(model(x, labels=masked).loss_sum, all_losses[:, :10].sum())
