"""YAML is read by the 1.2 rules, and what is ambiguous or dangerous is refused with its line."""

from __future__ import annotations

from typing import Any

import pytest

from titans_train.config.yaml_reader import plain_scalar, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4e-4", 4e-4), ("1E3", 1000.0), (".5", 0.5), ("3", 3), ("-7", -7), ("010", 10), ("0x10", 16), ("0o10", 8),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("1_000", "1_000"), ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"), ("1.3B", "1.3B"), (".inf", float("inf")), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = plain_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_quoted_scalars_stay_text() -> None:
    assert read_yaml("a: '3'\nb: \"true\"\nc: |\n  4\n", "x").tree == {"a": "3", "b": "true", "c": "4\n"}


def test_every_key_keeps_its_line() -> None:
    places = read_yaml("run:\n  name: a\n\nmodel:\n  width: 8\n", "x.yaml").places
    assert places[("model", "width")] == "x.yaml:5"


def test_a_key_given_twice_is_refused_with_both_lines_and_the_first_value_stays() -> None:
    document = read_yaml("a:\n  b: 1\n  c: 2\n  b: 3\n", "x.yaml")
    (problem,) = document.problems
    assert (problem.path, problem.where) == ("a.b", "x.yaml:4")
    assert "first on line 2" in problem.message
    assert document.tree == {"a": {"b": 1, "c": 2}}


def test_a_section_given_twice_is_refused() -> None:
    assert [p.path for p in read_yaml("a: {b: 1}\nc: 2\na: {d: 1}\n", "x").problems] == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.getcwd []",
        "a: !!int '3'",
        "a: !mine {b: 1}",
        "!!str a: 1",
        "a: !!python/name:os.system",
    ],
)
def test_tags_are_refused(text: str) -> None:
    problems = read_yaml(text, "x").problems
    assert len(problems) == 1
    assert "tag" in problems[0].message


def test_aliases_are_refused() -> None:
    (problem,) = read_yaml("a: &x 1\nb: *x\n", "x").problems
    assert problem.path == "b"


def test_duplicates_and_tags_are_reported_together() -> None:
    assert len(read_yaml("a: 1\na: 2\nb: !t 1\nc: 1\nc: 2\n", "x").problems) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not YAML"),
        ("a:\n\tb: 1", "not YAML"),
        ("a: \x00", "not YAML"),
        ("- 1\n- 2", "mapping"),
        ("just words", "mapping"),
        ("a: 1\n---\nb: 2", "second document"),
        ("a: " + "{b: " * 40 + "1" + "}" * 40, "nested"),
    ],
)
def test_what_is_no_config_is_one_problem_of_the_whole_file(text: str, message: str) -> None:
    (problem,) = read_yaml(text, "x.yaml").problems
    assert problem.path == ""
    assert message in problem.message


def test_an_empty_file_is_an_empty_mapping() -> None:
    document = read_yaml("# nothing\n", "x")
    assert (document.tree, document.problems) == ({}, [])
