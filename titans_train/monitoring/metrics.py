"""metrics.jsonl and TensorBoard: the same figures in both, one line and one set of scalars per logged step."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.durable import whole_file
from titans_train.monitoring.appended import Appended
from titans_train.monitoring.events import Events
from titans_train.untrusted import parse_json


class Metrics:
    """Continues the files of a run after `first_step`; what an interrupted run wrote later is dropped.

    A disk that does not take them ends nothing: `say` is told, and the figures wait in memory (appended.py).
    """

    def __init__(self, folder: Path, first_step: int, tensorboard: bool, say: Callable[[str], object] = print) -> None:
        path = folder / "metrics.jsonl"
        try:
            _drop_later(path, first_step, say)
        except OSError as error:
            say(f"{path} cannot be cut to the lines up to step {first_step} ({error}); it is continued as it is")
        self._file = Appended(path, say)
        self._events: Events | None = None
        if tensorboard:
            logging.getLogger("tensorboard").setLevel(logging.ERROR)
            self._events = Events(folder / "tensorboard", first_step + 1, say)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Numbers, or {name: number} groups, which become name/sub scalars. Those that are not finite are left out."""
        figures = _finite(figures)
        self._file.write((json.dumps({"step": step, **figures}) + "\n").encode())
        if self._events is not None:
            self._events.scalars(step, _flat(figures))

    def text(self, step: int, name: str, text: str) -> None:
        if self._events is not None:
            self._events.text(step, name, f"```\n{text}\n```")

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no other numbers, and no reader of a curve asks for them."""
    whole = {name: _finite(value) if isinstance(value, dict) else value for name, value in figures.items()}
    return {name: value for name, value in whole.items() if not isinstance(value, float) or math.isfinite(value)}


def _flat(figures: dict[str, Any]) -> dict[str, float]:
    out: dict[str, float] = {}
    for name, value in figures.items():
        out |= {f"{name}/{sub}": number for sub, number in value.items()} if isinstance(value, dict) else {name: value}
    return out


def _drop_later(path: Path, first_step: int, say: Callable[[str], object]) -> None:
    """Lines of later steps, and those that are none of ours or were cut."""
    content = _content(path)
    lines = [(line, _parsed(line)) for line in content.splitlines(keepends=True)]
    kept = b"".join(line for line, value in lines if value is not None and value["step"] <= first_step)
    damaged = sum(value is None for _, value in lines)
    if damaged:
        say(f"{path}: {damaged} lines that are damaged or were cut are left out")
    if kept == content[: len(kept)]:
        if len(kept) < len(content):  # needs no room
            os.truncate(path, len(kept))
        return
    with whole_file(path) as stream:
        stream.write(kept)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # as if there were none: to write it will fail as well, and be said
        return b""


def _parsed(line: bytes) -> dict[str, Any] | None:
    """None of a line that is no whole JSON object of a step: the last one of a killed run may be cut."""
    try:
        value = parse_json(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(value, dict) and type(value.get("step")) is int
    return value if whole else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines only, in their order; none where the file cannot be read."""
    values = map(_parsed, _content(path).splitlines(keepends=True))
    return [value for value in values if value is not None]
