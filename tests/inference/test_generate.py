"""generate: carried state equals one reading, states outlive the process, wrong models are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_prep.tokenizer import ByteTokenizer
from tests.models.shapes import tiny
from titans_train.inference import Sampler, generate, sample_text
from titans_train.inference.sampling import PREFILL, Reading, read
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState, load_tensor
from titans_train.shape import BLOCKS

GREEDY = Sampler(temperature=0)


def build(block: str) -> LanguageModel:
    """Untied: with a tied head random weights repeat one token, and a repetition hides a lost state."""
    torch.manual_seed(0)
    return LanguageModel(tiny(block, vocabulary=260, tied_head=False)).double().eval()


def tokens_of(model: LanguageModel, reading: Reading, count: int) -> list[int]:
    return [token for token, _ in generate(model, reading, count, GREEDY)]


@pytest.mark.parametrize("block", BLOCKS)
def test_greedy_generation_equals_reading_everything_again(block: str) -> None:
    model, prompt = build(block), list(b"the memory")
    out = tokens_of(model, read(model, prompt), 12)
    assert len(set(out)) > 4
    text = list(prompt)
    for token in out:
        assert int(model(torch.tensor([text])).logits[0, -1].argmax()) == token
        text.append(token)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(block: str, tmp_path: Path) -> None:
    model, path = build(block), tmp_path / "state.safetensors"
    whole = tokens_of(model, read(model, list(b"abc def")), 20)
    reading = read(model, list(b"abc def"))
    for _, after in generate(model, reading, 10, GREEDY):
        reading = after
    reading.state.save(path, model.shape, next_logits=reading.logits)
    loaded = Reading(ModelState.load(path, model.shape), load_tensor(path, "next_logits"))
    assert tokens_of(model, loaded, 10) == whole[10:]


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_the_state_does_not_grow_with_the_text(block: str) -> None:
    def size(value: object) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        parts = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
        return sum(size(v) for v in parts)

    model = build(block)
    assert size(read(model, list(range(64))).state) == size(read(model, list(range(128)) * 2).state)


def test_a_long_prompt_is_read_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = build("mag"), list(range(100))
    whole = read(model, prompt).logits
    monkeypatch.setattr("titans_train.inference.sampling.PREFILL", 7)
    assert PREFILL == 4096 and (read(model, prompt).logits - whole).abs().max() < 1e-10


def test_sampling_repeats_with_the_seed_and_keeps_to_top_p_and_the_vocabulary() -> None:
    model = build("lmm")
    texts = [sample_text(model, ByteTokenizer(), "def ", 8, Sampler(1.0, 0.9, 257), seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] and texts[0].startswith("def ")
    logits = torch.tensor([0.0, 5.0, 4.9, 1.0, 99.0])
    draws = {Sampler(1.0, 0.5, 4).draw(logits, torch.Generator().manual_seed(s)) for s in range(40)}
    assert draws == {1}
    assert {Sampler(1.0, 0.9, 4).draw(logits, torch.Generator().manual_seed(s)) for s in range(40)} == {1, 2}


def test_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        read(build("lmm"), [])
