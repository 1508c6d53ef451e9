"""YAML that runs code, explodes, never ends, or names what is no file."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from tests.hostile.refusals import little_memory, refused

Capture = pytest.CaptureFixture[str]
LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghijkl"))

TEXTS = {
    "object": ("run: !!python/object/apply:os.mkdir [MARK]\n", "tags are refused"),
    "new object": ("run: !!python/object/new:os.mkdir {args: [MARK]}\n", "tags are refused"),
    "name": ("run: {name: !!python/name:os.mkdir }\n", "tags are refused"),
    "tagged key": ("!!python/object/apply:os.mkdir [MARK]: 1\n", "tags are refused"),
    "binary": ("run: {name: !!binary aGVsbG8=}\n", "tags are refused"),
    "billion laughs": (LAUGHS, "aliases are not read"),
    "itself": ("run: &a\n  name: *a\n", "aliases are not read"),
    "merge": ("a: &a {name: x}\nrun:\n  <<: *a\n", "aliases are not read"),
    "merge of its own": ("run:\n  <<: {name: x}\n", "run.<<"),
    "twice": ("run: {name: a}\nrun: {name: b}\n", "key given twice"),
    "twice, often": ("a: 1\n" * 40_000, "more than 50 problems"),
    "deep lists": ("run: " + "[" * 100_000, "nested more than 16 deep"),
    "deep mappings": ("{" * 100_000, "nested more than 16 deep"),
    "deep keys": ("? " * 5_000 + "a\n", "nested more than 16 deep"),
    "deep keys in braces": ("{? " * 5_000, "nested more than 16 deep"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(9_000)), "and 89"),
    "many values": ("data: [" + "1," * 50_000 + "]\n", "more than 10,000 values"),
    "large": ("# x\n" * 100_000, "is larger than 262,144 bytes"),
    "not UTF-8": (b"run: {name: \xff\xfe}\n", "is not UTF-8"),
    "UTF-16": ("run: {name: x}\n".encode("utf-16"), "is not UTF-8"),
    "a NUL": ('run: {name: x, folder: "a\\0b"}\n', "run.folder"),
    "half a pair": ('run: {name: x, folder: "a\\ud800"}\n', "run.folder"),
    "a NUL in a key": ('"a\\0b": 1\n', "a\\x00b"),
    "escapes": ('"\\x1b[31m": 1\n', "unknown key"),
    "a text for a number": ("training: {steps: '100'}\n", "training.steps"),
    "a boolean for a number": ("training: {steps: true}\n", "training.steps"),
    "a fraction for a number": ("training: {steps: 1.5}\n", "training.steps"),
    "infinite": ("optimizer: {learning_rate: .inf}\n", "optimizer.learning_rate"),
    "no number": ("optimizer: {learning_rate: .nan}\n", "optimizer.learning_rate"),
    "overflow": ("optimizer: {learning_rate: 1e999}\n", "optimizer.learning_rate"),
    "ten thousand digits": ("training: {steps: " + "9" * 10_000 + "}\n", "training.steps"),
    "a run outside": ("run: {name: ../../x}\n", "run.name"),
    "a hidden run": ("run: {name: .x}\n", "run.name"),
    "base: itself": ("base: CONFIG\n", "form a circle"),
    "base: through a folder": ("base: ../FOLDER/CONFIG\n", "form a circle"),
    "base: a list": ("base: [a.yaml]\n", "is not the path of a file"),
    "base: no name": ('base: "\\0"\n', "base"),
    "base: too long a name": ("base: " + "a" * 5_000 + "\n", "cannot be read"),
    "base: a device": ("base: /dev/zero\n", "is not a regular file"),
    "base: random": ("base: /dev/urandom\n", "is not a regular file"),
    "base: a pipe": ("base: PIPE\n", "is not a regular file"),
    "base: a folder": ("base: /etc\n", "Is a directory"),
    "base: a file of secrets": ("base: SECRET\n", "a config is a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_hostile_config_is_refused(name: str, tmp_path: Path, capsys: Capture) -> None:
    content, message = TEXTS[name]
    mark, secret = tmp_path / "mark", tmp_path / "secret"
    os.mkfifo(tmp_path / "pipe")
    secret.write_text("- password\n" * 20 + "- the last line\n")
    path = tmp_path / "config.yaml"
    if isinstance(content, str):
        replaced = {"MARK": str(mark), "CONFIG": path.name, "FOLDER": tmp_path.name, "PIPE": "pipe", "SECRET": "secret"}
        for word, text in replaced.items():
            content = content.replace(word, text)
        content = content.encode()
    path.write_bytes(content)
    with little_memory():
        error = refused(capsys, "check", str(path))
    assert message in error
    assert "the last line" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "pipe", "secret"]


def test_a_long_chain_of_base_files_is_refused(tmp_path: Path, capsys: Capture) -> None:
    for number in range(3_000):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    assert "more than 16 base files" in refused(capsys, "check", str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(("override", "message"), [
    ("run.name=!!python/object/apply:os.getcwd []", "run.name"), ("run.name=../x", "run.name"),
    ('run.folder="a\\0b"', "run.folder"), ("training.steps=" + "9" * 10_000, "training.steps"),
    (".".join("a" * 2_000) + "=1", "unknown key"), ("base=/etc/passwd", "a base cannot be an override"),
])  # fmt: skip
def test_a_hostile_override_is_refused(override: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {name: x}\n")
    assert message in refused(capsys, "check", str(path), override)
