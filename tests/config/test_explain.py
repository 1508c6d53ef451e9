"""A refused value comes with its path, the value, the limit and the nearest thing to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.samples import TEXT, load, problems, write


@pytest.mark.parametrize(
    ("override", "message", "suggestion"),
    [
        ("model.layer=3", "unknown key", "model.layers"),
        ("memory.steps=3", "unknown key", "training.steps"),
        ("modle.width=3", "unknown key", ""),
        ("checkpoint.zzz=3", "unknown key", "every, keep"),
        ("model.block=mga", "'mga' is none of transformer, lmm, mac, mag, mal", "mag"),
        ("run.dtype=bf16", "'bf16'", "bfloat16"),
        ("model.layers=0", "0 is refused, the limit is at least 1", "use 1"),
        ("memory.depth=5", "5 is refused, the limit is at most 4", "use 4"),
        ("optimizer.beta1=1", "below 1", ""),
        ("run.seed=2147483648", "below 2147483648", "use 2147483647"),
        ("optimizer.learning_rate=0", "0 is refused, the limit is above 0", ""),
        ("optimizer.learning_rate=.nan", "nan is not a finite number", ""),
        ("training.steps='3'", "'3' is not an integer", "write 3, without quotes"),
        ("training.steps=3.0", "3.0 is not an integer", "write 3"),
        ("training.steps=1_000", "'1_000' is not an integer", "write 1000"),
        ("training.steps=true", "true is not an integer", ""),
        ("training.steps=null", "null is not an integer", ""),
        ("optimizer.eps=tiny", "'tiny' is not a number", ""),
        ("model.tied_head=on", "'on' is not a boolean", "write true"),
        ("model.tied_head=0", "0 is not a boolean", "write false"),
        ("run.name=170", "170 is not text", '"170"'),
        ("run.name=a/b", "'a/b'", "use a-b"),
        ("run.folder=''", "empty", "parent of the run directory"),
        ("model=3", "3 is not a section", "indented"),
    ],
)
def test_each_kind_of_wrong_value_is_explained(tmp_path: Path, override: str, message: str, suggestion: str) -> None:
    found = problems(write(tmp_path), override)
    path = override.partition("=")[0]
    assert path in found or f"{path.partition('.')[0]}" in found
    problem = found.get(path) or found[path.partition(".")[0]]
    assert message in problem.message
    assert suggestion in problem.suggestion


def test_a_whole_number_is_good_for_a_fraction(tmp_path: Path) -> None:
    assert load(tmp_path, "optimizer.weight_decay=0", "attention.rope_base=10000").optimizer.weight_decay == 0


def test_missing_keys_and_sections_say_what_to_write(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "run: {}\nmodel: {block: lmm, layers: 1, width: 8, heads: 1}\ndata: {path: x}\n"))
    assert set(found) == {"run.name", "model.vocabulary", "training"}
    assert "steps" in found["training"].suggestion
    assert found["run.name"].where.endswith("config.yaml:1")


def test_problems_carry_file_and_line(tmp_path: Path) -> None:
    found = problems(write(tmp_path, TEXT + "monitoring:\n  log_every: 0\n"))
    assert found["monitoring.log_every"].where.endswith("config.yaml:9")


def test_all_problems_come_at_once_across_kinds_and_sections(tmp_path: Path) -> None:
    text = TEXT + "memory: {depth: 2}\noptimizer: {warmup_steps: 50, bta1: 0.9}\n"
    found = problems(
        write(tmp_path, text), "model.heads=5", "model.norm_eps=x", "parallel.tensor=2", "run.dtype=half", world_size=3
    )
    assert set(found) == {
        "memory", "optimizer.warmup_steps", "optimizer.bta1", "model.heads", "model.norm_eps", "parallel.tensor",
        "run.dtype", "world size",
    }  # fmt: skip


def test_a_check_whose_value_is_already_wrong_adds_nothing(tmp_path: Path) -> None:
    assert set(problems(write(tmp_path), "model.width=zero", "model.heads=5")) == {"model.width"}
