"""Files, their bases and overrides become one frozen config; what cannot be read is refused with a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.config.samples import TEXT, load, problems, write
from titans_train.config import ConfigError, dump_config, load_config


def test_defaults_fill_what_is_not_written(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert (config.memory.chunk_size, config.memory.depth, config.optimizer.learning_rate) == (16, 2, 4e-4)


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValidationError):
        config.model.width = 64


def test_a_base_lies_underneath_and_is_named_relative_to_its_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, name="base.yaml")
    write(tmp_path, "base: base.yaml\nmodel: {layers: 5}\n", "middle.yaml")
    path = write(tmp_path / "sub", "base: ../middle.yaml\nrun: {name: top}\n", "top.yaml")
    config = load_config(path)
    assert (config.run.name, config.model.layers, config.model.width) == ("top", 5, 32)


def test_bases_in_a_circle_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: ./a.yaml\n", "b.yaml")
    found = problems(tmp_path / "a.yaml")
    assert list(found) == ["base"]
    assert "circle" in found["base"].message


def test_a_missing_base_is_refused_with_a_similar_file(tmp_path: Path) -> None:
    write(tmp_path, name="quickstart.yaml")
    path = write(tmp_path, "base: quikstart.yaml\n")
    assert "quickstart.yaml" in problems(path)["base"].suggestion


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "no file" in problems(tmp_path / "none.yaml")[""].message


def test_a_base_that_is_no_text_is_refused(tmp_path: Path) -> None:
    assert "not the path" in problems(write(tmp_path, TEXT + "base: 3\n"))["base"].message


def test_a_file_that_is_not_utf8_is_refused_with_the_offset(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"run: {name: caf\xe9}\n")
    assert "0xe9 at offset 15" in problems(path)[""].message


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path)[""].message


def test_overrides_are_yaml_scalars_and_win(tmp_path: Path) -> None:
    config = load(
        tmp_path, "optimizer.learning_rate=1e-3", "attention.persistent_tokens=0", "monitoring.tensorboard=false",
        "monitoring.sample_prompt=def f(x):  # a comment", 'run.name="170"', "model.feed_forward=null",
    )  # fmt: skip
    assert config.optimizer.learning_rate == 1e-3
    assert config.attention.persistent_tokens == 0
    assert config.monitoring.tensorboard is False
    assert config.monitoring.sample_prompt == "def f(x):  # a comment"
    assert config.run.name == "170"
    assert config.model.feed_forward is None


def test_an_override_may_open_a_section_that_was_null(tmp_path: Path) -> None:
    config = load(tmp_path, "data.recall.pairs=4")
    assert config.data.recall is not None
    assert (config.data.recall.pairs, config.data.recall.values) == (4, 64)


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", "--steps 3"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    assert "key.path=value" in problems(write(tmp_path), override)[""].message


def test_an_override_given_twice_is_refused(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "training.steps=3", "training.steps=4")
    assert "twice" in found["training.steps"].message


@pytest.mark.parametrize("override", ["base=x.yaml", 'run.name="open'])
def test_an_override_without_meaning_is_refused(tmp_path: Path, override: str) -> None:
    assert list(problems(write(tmp_path), override)) == [override.partition("=")[0]]


def test_overrides_are_checked_as_files_are(tmp_path: Path) -> None:
    found = problems(write(tmp_path), "model.depth=3", "training.steps=many")
    assert found["model.depth"].where == "command line"
    assert found["training.steps"].where == "command line"


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = load(
        tmp_path, "monitoring.sample_prompt='1e5 \"x\" : # ü\t'", "run.name='1e5'", "data.recall.pairs=4",
        "optimizer.eps=1e-8", "optimizer.weight_decay=0",
    )  # fmt: skip
    again = load_config(write(tmp_path, dump_config(config), "dumped.yaml"))
    assert again == config
    assert again.run.name == "1e5"


def test_the_error_is_a_value_error_that_lists_every_problem(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 problems") as raised:
        load(tmp_path, "model.heads=5", "model.widht=3", "checkpoint.keep=0")
    assert isinstance(raised.value, ConfigError)
    assert all(path in str(raised.value) for path in ("model.heads", "model.widht", "checkpoint.keep"))
