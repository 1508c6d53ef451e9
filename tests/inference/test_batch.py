"""Rows of a batch are what each is alone, wherever each is in its chunk, segment and window."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.inference.test_generate import build
from tests.inference.test_prefill import apart
from tests.models.shapes import tiny
from titans_train.inference import Reading, Sampler, generate, generate_rows, read, read_rows
from titans_train.inference.batch import Rows, groups
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState
from titans_train.shape import BLOCKS

MODELS = (*BLOCKS, "lmm-deltanet", "mag-gated_deltanet", "mal-rwkv7", "lmm-mamba2")
TEXTS = [[(7 * n + row * 31) % 256 for n in range(length)] for row, length in enumerate((1, 3, 4, 7, 8, 11, 16, 3, 30))]


def alone(model: LanguageModel, reading: Reading, count: int, sampler: Sampler, seed: int) -> list[int]:
    return [token for token, _ in generate(model, reading, count, sampler, seed)]


def together(
    model: LanguageModel, readings: list[Reading], count: int, sampler: Sampler, seeds: list[int]
) -> tuple[list[list[int]], list[Reading]]:
    made: list[list[int]] = [[] for _ in readings]

    def take(row: int, token: int) -> bool:
        made[row].append(token)
        return True

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return made, generate_rows(model, readings, count, sampler, generators, take)


@pytest.mark.parametrize("block", MODELS)
@torch.inference_mode()
def test_each_row_gets_the_logits_that_it_gets_alone_and_ends_in_the_same_state(block: str) -> None:
    model, count = build(block), 19
    readings = [read(model, text) for text in TEXTS]
    given = [[(row * 17 + 5 * n) % 256 for n in range(count)] for row in range(len(TEXTS))]
    for numbers in groups(readings):
        rows = Rows(model, [readings[n] for n in numbers])
        expected = [readings[n] for n in numbers]
        for step in range(count):
            rows.step([given[n][step] for n in numbers])
            expected = [read(model, [given[n][step]], e) for n, e in zip(numbers, expected, strict=True)]
            assert (rows.logits - torch.stack([e.logits for e in expected])).abs().max() < 1e-10
        for place, one in enumerate(expected):
            on = [read(model, text, r) for text in ([9], list(range(13))) for r in (rows.reading(place), one)]
            assert (on[0].logits - on[1].logits).abs().max() < 1e-10
            assert (on[2].logits - on[3].logits).abs().max() < 1e-10
            assert torch.equal(rows.reading(place).seen, one.seen)


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_of_any_chunk_size(chunk: int) -> None:
    torch.manual_seed(0)
    shape = tiny("mag", vocabulary=260, tied_head=False, memory={"chunk_size": chunk})
    model = LanguageModel(shape).double().eval()
    readings = [read(model, text) for text in TEXTS]
    greedy = Sampler(0)
    made, last = together(model, readings, 21, greedy, [0] * len(readings))
    assert made == [alone(model, reading, 21, greedy, 0) for reading in readings]
    for text, out, reading in zip(TEXTS, made, last, strict=True):
        assert (read(model, text + out).logits - reading.logits).abs().max() < 1e-10


@pytest.mark.parametrize("block", MODELS)
@pytest.mark.parametrize("sampler", [Sampler(0), Sampler(0.9, 0.9, 256, 40, 0.01, 1.3)], ids=["greedy", "sampled"])
def test_rows_are_continued_by_the_tokens_that_each_gets_alone(block: str, sampler: Sampler) -> None:
    model, seeds = build(block), list(range(len(TEXTS)))
    readings = [read(model, text) for text in TEXTS]
    made, _ = together(model, readings, 15, sampler, seeds)
    assert made == [alone(model, r, 15, sampler, seed) for r, seed in zip(readings, seeds, strict=True)]
    assert len(set(itertools.chain(*made))) > 10


@pytest.mark.parametrize("block", ["mag", "mac", "transformer", "mal-rwkv7"])
def test_rows_may_end_at_different_lengths_and_leave_states_that_can_be_saved(block: str, tmp_path: object) -> None:
    model, greedy = build(block), Sampler(0)
    readings = [read(model, text) for text in TEXTS]
    lengths = [3, 9, 1, 12, 7, 12, 2, 5, 12]
    made: list[list[int]] = [[] for _ in readings]

    def take(row: int, token: int) -> bool:
        made[row].append(token)
        return len(made[row]) < lengths[row]

    last = generate_rows(model, readings, 12, greedy, [torch.Generator() for _ in readings], take)
    assert [len(out) for out in made] == lengths
    for number, (text, out, reading) in enumerate(zip(TEXTS, made, last, strict=True)):
        assert out == alone(model, readings[number], lengths[number], greedy, 0)
        path = f"{tmp_path}/{number}"
        reading.state.save(path, model.shape)
        loaded = ModelState.load(path, model.shape)
        further = read(model, [1, 2, 3, 4, 5], loaded).logits
        assert (further - read(model, text + out + [1, 2, 3, 4, 5]).logits).abs().max() < 1e-10


def test_all_rows_are_one_batch_but_in_mac_those_at_one_place_of_a_segment() -> None:
    for block in MODELS:
        found = groups([read(build(block), text) for text in TEXTS])
        expected = [[0], [1, 5, 7], [2], [3], [4, 6], [8]] if block == "mac" else [list(range(len(TEXTS)))]
        assert found == expected


@pytest.mark.parametrize("block", MODELS)
def test_several_questions_go_on_from_one_state_and_none_sees_another(block: str) -> None:
    model = build(block)
    document, questions = read(model, list(range(50))), [[1, 2, 3], [4, 5], [6, 7, 8], [9]]
    before = [tensor.clone() for tensor in (document.logits, document.seen)]
    for question, asked in zip(questions, read_rows(model, questions, document), strict=True):
        one = read(model, list(range(50)) + question)
        assert (asked.logits - one.logits).abs().max() < 1e-10
        assert apart(asked.state, one.state) < 1e-10
        assert torch.equal(asked.seen, one.seen)
    assert torch.equal(before[0], document.logits) and torch.equal(before[1], document.seen)
    assert apart(read(model, list(range(50))).state, document.state) < 1e-10
