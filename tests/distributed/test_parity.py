"""Training on real gloo processes equals one process: every block, ZeRO stage and number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from titans_train.benchmark.parity import GRADIENT_LIMIT, Layout, run
from titans_train.shape import BLOCKS

PARAMETER_LIMIT = 2e-5  # three AdamW steps of 1e-3; fp32 rounding of a small gradient moves its step a little


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:

    return run(list(BLOCKS), [Layout(data=request.param)], [0, 1, 2, 3])


def test_gradients_norm_and_parameters_equal_one_process(table: list[dict[str, Any]]) -> None:
    assert len(table) == len(BLOCKS) * 4
    for row in table:
        assert row["gradient"] <= GRADIENT_LIMIT, row
        assert row["norm"] <= 1e-5, row
        assert row["parameter"] <= PARAMETER_LIMIT, row
