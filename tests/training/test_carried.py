"""Rows that go on in the next batch: what they carry is what one long sequence would have, and no gradient."""

from __future__ import annotations

import pytest
import torch

from tests.models.shapes import tiny
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState
from titans_train.models.tree import tensors_of
from titans_train.parallel import Mesh
from titans_train.placement import Placement
from titans_train.plan_messages import carried_row_bytes
from titans_train.training.carried import CarriedStates

BLOCKS = ["transformer", "lmm", "mac", "mag", "mal"]


class Plan:
    """What CarriedStates asks of a plan."""

    accumulation = 1

    def __init__(self, block: str) -> None:
        self.shape = tiny(block, attention={"window": 6})


def carried_and_model(block: str) -> tuple[CarriedStates, LanguageModel]:
    plan = Plan(block)
    torch.manual_seed(1)
    return CarriedStates(plan, Mesh(0, 1)), LanguageModel(plan.shape).double()  # type: ignore[arg-type]


@pytest.mark.parametrize("block", BLOCKS)
def test_two_batches_equal_one_long_sequence(block: str) -> None:
    carried, model = carried_and_model(block)
    tokens = torch.randint(0, 29, (2, 48))
    want = model(tokens).logits
    for n in range(3):
        out = model(tokens[:, 16 * n : 16 * n + 16], state=carried.before(0), return_state=True)
        assert (out.logits - want[:, 16 * n : 16 * n + 16]).abs().max() < 1e-12
        carried.after(0, out.state)
        assert not any(t.requires_grad for t in tensors_of(carried.before(0)))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_row_that_does_not_go_on_starts_as_if_it_were_alone(block: str) -> None:
    carried, model = carried_and_model(block)
    tokens = torch.randint(0, 29, (2, 32))
    carried.after(0, model(tokens[:, :16], return_state=True).state)
    starts = torch.zeros(2, 16, dtype=torch.bool)
    starts[1, 0] = True
    got = model(tokens[:, 16:], state=carried.before(0), document_starts=starts).logits
    assert (got[0] - model(tokens[:1]).logits[0, 16:]).abs().max() < 1e-12
    assert (got[1] - model(tokens[1:, 16:]).logits[0]).abs().max() < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_the_bytes_of_a_row_are_those_of_the_plan(block: str) -> None:
    plan = Plan(block)
    at = Placement(
        tensor=1, replicas=1, sequence_parallel=False, item=4, sequences=3, length=16, accumulation=1,
        checkpointing=False, carries=True,
    )  # fmt: skip
    state = LanguageModel(plan.shape)(torch.randint(0, 29, (3, 16)), return_state=True).state
    assert isinstance(state, ModelState)
    assert sum(t.numel() * t.element_size() for t in tensors_of(state)) == 3 * carried_row_bytes(plan.shape, at)
