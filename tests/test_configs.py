"""Every file in configs/ is a valid config, and a model has the size that its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_train.config import load_config
from titans_train.plan import make_plan
from titans_train.shape import BLOCKS

CONFIGS = Path(__file__).parent.parent / "configs"
# variants.yaml is a list of changes: tests/benchmark/test_ablations.py loads it
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.name != "variants.yaml")
SIZES = {"170M": 170e6, "340M": 340e6, "400M": 400e6, "760M": 760e6, "1.3B": 1.3e9}
TOKENS = {"170M": 15e9, "340M": 15e9, "400M": 15e9, "760M": 30e9}


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_a_valid_config(path: Path) -> None:
    config = load_config(path)
    plan = make_plan(config, config.parallel.tensor * config.parallel.sequence)
    assert plan.parameter_count > 0


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name in SIZES or p.stem in SIZES], ids=name)
def test_a_model_has_the_size_of_its_name_within_5_percent(path: Path) -> None:
    size = path.parent.name if path.parent.name in SIZES else path.stem
    count = make_plan(load_config(path)).parameter_count
    assert abs(count / SIZES[size] - 1) <= 0.05, f"{count:,}"


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_every_block_with_the_recipe_of_the_paper(size: str) -> None:
    files = {p.stem: p for p in (CONFIGS / "sizes" / size).glob("*.yaml")}
    assert set(files) == set(BLOCKS)
    for block, path in files.items():
        plan = make_plan(load_config(path))
        assert plan.shape.block == block
        assert plan.config.run.name == f"{size}-{block}"
        assert (plan.shape.vocabulary, plan.config.training.sequence_length, plan.tokens_per_step) == (
            32000,
            4096,
            2**19,
        )
        assert (plan.config.optimizer.learning_rate, plan.config.optimizer.weight_decay) == (4e-4, 0.1)
        assert plan.total_tokens == pytest.approx(TOKENS.get(size, 100e9), rel=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_the_blocks_of_a_size_differ_in_depth_only(size: str) -> None:
    shapes = [make_plan(load_config(p)).shape for p in (CONFIGS / "sizes" / size).glob("*.yaml")]
    assert len({(s.width, s.heads, s.feed_forward, s.tied_head) for s in shapes}) == 1


def test_the_quickstart_and_its_baseline_have_the_same_size_data_and_training() -> None:
    ours, baseline = (load_config(CONFIGS / f) for f in ("quickstart.yaml", "quickstart_transformer.yaml"))
    assert (ours.model.block, baseline.model.block) == ("mag", "transformer")
    assert make_plan(ours).parameter_count == pytest.approx(make_plan(baseline).parameter_count, rel=0.01)
    assert (ours.data, ours.training, ours.optimizer, ours.run.seed) == (
        baseline.data, baseline.training, baseline.optimizer, baseline.run.seed,
    )  # fmt: skip


def test_most_needles_of_the_ablations_are_beyond_windows_and_convolutions() -> None:
    config = load_config(CONFIGS / "ablations" / "needles.yaml")
    assert config.data.needles is not None and config.attention.window is not None
    reach = config.model.layers * max(config.attention.window, config.memory.convolution)
    assert reach <= config.training.sequence_length / 4
    assert config.attention.segment <= config.training.sequence_length / 4
