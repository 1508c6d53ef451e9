"""The learning rate as a function of the step, and which parameters decay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.corpus import run_config
from tests.models.shapes import tiny
from titans_train.config import RunConfig
from titans_train.models import LanguageModel
from titans_train.training.optimizer import decays, learning_rate


def config_of(steps: int, warmup: int) -> RunConfig:
    base = run_config(Path("unused"), Path("runs")).model_dump(mode="json")
    base["training"]["steps"] = steps
    base["optimizer"] |= {"learning_rate": 1.0, "warmup_steps": warmup, "final_fraction": 0.1}
    return RunConfig.model_validate(base)


def test_warm_up_is_linear_then_a_cosine_to_the_final_fraction() -> None:
    config = config_of(101, 10)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("steps,warmup", [(1, 0), (1, 1), (5, 5)])
def test_short_runs_have_a_learning_rate(steps: int, warmup: int) -> None:
    rates = [learning_rate(step, config_of(steps, warmup)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_matrices_decay_and_starting_points_norms_and_taps_do_not() -> None:
    for block in ("lmm", "mac", "mag", "mal", "transformer", "lmm-rwkv7", "lmm-mamba2"):
        for name, parameter in LanguageModel(tiny(block)).named_parameters():
            linear = name.endswith(".weight") and "conv" not in name and parameter.ndim == 2
            assert decays(name, parameter) == linear, name
