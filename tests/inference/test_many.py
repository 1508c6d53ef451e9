"""generate from the command line for many texts: prompts, samples, questions about one document, standard input."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hostile.tensors import rewritten
from tests.inference.checkpoints import config, write_checkpoint
from tests.inference.test_command import generated, refused
from titans_train.__main__ import main
from titans_train.shape import BLOCKS

Capture = pytest.CaptureFixture[str]
PROMPTS = ["import ", "größer", "a", "def f(x): return x", "import "]


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return str(write_checkpoint(config(tmp_path / "runs")))


def written(folder: Path, *lines: object, name: str = "lines") -> str:
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return str(path)


def rows(capsys: Capture, *args: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in generated(capsys, *args, "--jsonl").splitlines()]


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


@pytest.mark.parametrize("block", BLOCKS)
def test_each_line_of_a_prompts_file_gets_the_text_that_it_gets_alone(
    block: str, tmp_path: Path, capsys: Capture
) -> None:
    source = str(write_checkpoint(config(tmp_path / "runs", block)))
    file = written(tmp_path, *({"prompt": p} if n % 2 else json.dumps(p) for n, p in enumerate(PROMPTS)), "")
    sampled = ["--seed", "4", "--top-k", "40", "--repetition-penalty", "1.2"]
    for batch, options in (("16", ["--temperature", "0"]), ("2", sampled)):
        options = [*options, "--tokens", "12"]
        found = rows(capsys, source, *options, "--prompts-file", file, "--batch", batch)
        assert [(r["line"], r["sample"], r["prompt"]) for r in found] == [(n, 0, p) for n, p in enumerate(PROMPTS, 1)]
        for row in found:
            alone = generated(capsys, source, *options, "--prompt", row["prompt"])
            assert row["prompt"] + row["text"] + "\n" == alone
            assert (row["tokens"], row["finish"]) == (12, "length")


def test_samples_are_those_of_the_seeds_that_follow(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    write = [checkpoint, "--prompt", "import ", "--tokens", "8", "--temperature", "1.5"]
    found = rows(capsys, *write, "--seed", "3", "--samples", "4", "--batch", "3")
    assert [row["sample"] for row in found] == [0, 1, 2, 3] and len({row["text"] for row in found}) == 4
    for row in found:
        (alone,) = rows(capsys, *write, "--seed", str(3 + row["sample"]))
        assert alone["text"] == row["text"]
    printed = generated(capsys, *write, "--seed", "3", "--samples", "2")
    assert printed.startswith("--- 1 of 2: sample 0 ---\nimport ") and "\n--- 2 of 2: sample 1 ---\nimport " in printed


def test_a_document_is_read_once_and_asked_many_questions(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    document, state = "A long document. " * 20, str(tmp_path / "document")
    questions = ["Who?", "größer als?", "Who was it, and why?"]
    ask = ["--ask", written(tmp_path, *questions), "--tokens", "9", "--temperature", "0"]
    only_read = ["--prompt", document, "--tokens", "0", "--save-state", state]
    assert generated(capsys, checkpoint, *only_read) == document + "\n"
    size = Path(state).stat().st_size
    found = rows(capsys, checkpoint, "--load-state", state, *ask)
    assert [row["prompt"] for row in found] == questions and Path(state).stat().st_size == size
    for row in found:
        whole = generated(capsys, checkpoint, "--prompt", document + row["prompt"], *ask[2:])
        assert whole == document + row["prompt"] + row["text"] + "\n"
    at_once = rows(capsys, checkpoint, "--prompt", document, *ask)
    assert [row["text"] for row in at_once] == [row["text"] for row in found]
    assert "several" in refused(capsys, checkpoint, "--load-state", state, *ask, "--save-state", state)


def test_standard_input_is_read_first_and_then_continued(
    checkpoint: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text, greedy = "größer 🙂 und länger\n" * 30, ["--temperature", "0", "--tokens", "15"]
    whole = generated(capsys, checkpoint, *greedy, "--prompt", text + "then")
    monkeypatch.setattr("titans_train.inference.incoming.PIECE", 50)
    piped(monkeypatch, text.encode())
    assert text + generated(capsys, checkpoint, *greedy, "--stdin", "--prompt", "then") == whole
    state = str(tmp_path / "state")
    piped(monkeypatch, text.encode()[:333])
    assert generated(capsys, checkpoint, "--stdin", "--tokens", "0", "--save-state", state) == "\n"
    piped(monkeypatch, text.encode()[333:])
    options = [*greedy, "--load-state", state, "--stdin", "--prompt", "then"]
    assert text + generated(capsys, checkpoint, *options) == whole
    piped(monkeypatch, text.encode())
    (row,) = rows(capsys, checkpoint, *greedy, "--stdin", "--ask", written(tmp_path, "then"))
    assert text + row["prompt"] + row["text"] + "\n" == whole
    piped(monkeypatch, b"abc\xff")
    assert "not UTF-8 text at byte 3" in refused(capsys, checkpoint, "--stdin")
    piped(monkeypatch, b"")
    assert "no text on standard input" in refused(capsys, checkpoint, "--stdin")


def test_text_is_printed_as_it_is_made_in_whole_characters(checkpoint: str, tmp_path: Path) -> None:
    """A real pipe, read while the process runs, its input divided amid a character."""
    command = [sys.executable, "-m", "titans_train", "generate", checkpoint, "--stdin", "--tokens", "40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [*command, "--seed", "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, cwd=root,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        content = "größer 🙂".encode()
        for part in (content[:3], content[3:-2], content[-2:]):
            process.stdin.write(part)
            process.stdin.flush()
        process.stdin.close()
        pieces = []
        while piece := os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(piece.decode("utf-8"))  # each whole
        assert process.wait() == 0, process.stderr.read()
        assert f"read {len(content)} tokens" in process.stderr.read().decode()
    assert len(pieces) > 1 and pieces[-1].endswith("\n")


def test_a_stop_text_ends_a_text_and_is_left_out(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    write = [checkpoint, "--tokens", "40", "--temperature", "0"]
    whole = rows(capsys, *write, "--prompt", "import ")[0]["text"]
    stop = next(c for c in whole[5:] if c.isascii())
    (row,) = rows(capsys, *write, "--prompt", "import ", "--stop", "never there", "--stop", stop)
    assert row["text"] == whole[: whole.index(stop)] and row["finish"] == "stop" and row["tokens"] < 40
    streamed = generated(capsys, *write, "--prompt", "import ", "--stop", stop, "--stream")
    assert streamed == generated(capsys, *write, "--prompt", "import ", "--stop", stop) == f"import {row['text']}\n"
    file = written(tmp_path, *map(json.dumps, PROMPTS))
    for one in rows(capsys, *write, "--prompts-file", file, "--stop", stop):
        (alone,) = rows(capsys, *write, "--prompt", one["prompt"], "--stop", stop)
        assert (one["text"], one["finish"], one["tokens"]) == (alone["text"], alone["finish"], alone["tokens"])


def test_the_repetition_penalty_goes_on_with_a_saved_state(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    write = [checkpoint, "--temperature", "0", "--repetition-penalty", "1.5"]
    whole = generated(capsys, *write, "--prompt", "import ", "--tokens", "20")
    first = generated(capsys, *write, "--prompt", "import ", "--tokens", "10", "--save-state", state)
    second = generated(capsys, *write, "--tokens", "10", "--load-state", state)
    assert (first[:-1] + second).replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert whole != generated(capsys, checkpoint, "--temperature", "0", "--prompt", "import ", "--tokens", "20")


def test_seen_tokens_of_a_state_file_are_checked_and_may_be_missing(
    checkpoint: str, capsys: Capture, tmp_path: Path
) -> None:
    state, write = tmp_path / "state", [checkpoint, "--tokens", "5"]
    generated(capsys, *write, "--prompt", "import ", "--save-state", str(state))
    whole, kept = generated(capsys, *write, "--load-state", str(state)), state.read_bytes()
    changes: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda t: t[1:], lambda t: t.float(), lambda t: t[None]]
    for change in changes:
        rewritten(state, lambda tensors, change=change: tensors.update(seen=change(tensors["seen"])))
        assert "its seen tokens are" in refused(capsys, *write, "--load-state", str(state))
        state.write_bytes(kept)
    rewritten(state, lambda tensors: (tensors.pop("seen"), tensors.pop("content")))
    assert generated(capsys, *write, "--load-state", str(state)) == whole


def test_what_does_not_go_together_is_refused(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    good, x = written(tmp_path, '"a"'), ["--prompt", "x"]
    for options, part in (
        (["--prompts-file", good, "--prompt", "x"], "not allowed with"),
        (["--prompts-file", good, "--ask", good], "give one of them"),
        (["--ask", good], "nothing to continue"),
        ([*x, "--samples", "2", "--stream"], "--stream prints one text"),
        ([*x, "--jsonl", "--stream"], "--stream prints one text"),
        ([*x, "--samples", "2", "--save-state", good], "--save-state keeps the state of one text"),
        ([*x, "--samples", "0"], "--samples is 0"), ([*x, "--batch", "0"], "--batch is 0"),
        ([*x, "--stop", ""], "--stop is empty"), ([*x, "--top-k", "0"], "top-k is 0"),
        ([*x, "--min-p", "2"], "min-p is 2"), ([*x, "--repetition-penalty", "0"], "repetition-penalty is 0"),
    ):  # fmt: skip
        assert part in refused(capsys, checkpoint, *options), options


def test_prompts_files_that_are_none_are_refused_by_line(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    for line, part in (
        ("{", "is not JSON"), ("NaN", "is not JSON"), ('{"prompt": "a", "prompt": "b"}', "is not JSON"),
        ("1", "holds no prompt"), ('{"text": "a"}', "holds no prompt"), ('{"prompt": 1}', "holds no prompt"),
        ("[" * 100_000, "is not JSON"), ('"\\ud800"', "not UTF-8 text at character 0"), ('""', "the prompt is empty"),
    ):  # fmt: skip
        error = refused(capsys, checkpoint, "--prompts-file", written(tmp_path, '"good"', "", line))
        assert part in error and "line 3" in error, line
    (tmp_path / "latin").write_bytes("größer".encode("latin-1"))
    for option in ("--prompts-file", "--ask"):
        written(tmp_path, "", "  ", name="empty")
        for file, part in (("latin", "as UTF-8 text"), ("nothing", "No such file"), ("empty", "holds no line")):
            assert part in refused(capsys, checkpoint, option, str(tmp_path / file))


def test_an_empty_prompt_goes_on_from_the_state(checkpoint: str, capsys: Capture, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    generated(capsys, checkpoint, "--prompt", "import ", "--tokens", "0", "--save-state", state)
    file = written(tmp_path, '""', '"x"')
    first, _ = rows(capsys, checkpoint, "--load-state", state, "--prompts-file", file, "--tokens", "5")
    assert "import " + first["text"] + "\n" == generated(capsys, checkpoint, "--prompt", "import ", "--tokens", "5")


def test_help_names_what_can_be_done(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "-h"])
    text = capsys.readouterr().out
    for part in ("reading:", "several texts:", "sampling:", "output:", "read once", "--ask FILE"):
        assert part in text
