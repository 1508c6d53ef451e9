"""metrics.jsonl and TensorBoard: the same figures in both, one line and one set of scalars per logged step."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any


class Metrics:
    """Opens the files of a run for the steps after `first_step`; what an interrupted run wrote later is dropped."""

    def __init__(self, folder: Path, first_step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step]
        temporary = self.path.with_suffix(".half")
        temporary.write_text("".join(f"{json.dumps(line)}\n" for line in kept))
        temporary.rename(self.path)
        self._file = self.path.open("a", buffering=1)
        self._writer: Any = None
        if tensorboard:
            logging.getLogger("tensorboard").setLevel(logging.ERROR)
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)  # type: ignore[no-untyped-call]

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Numbers, or {name: number} groups, which become name/sub scalars. Those that are not finite are left out."""
        figures = _finite(figures)
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        if self._writer is not None:
            for name, value in figures.items():
                group = value.items() if isinstance(value, dict) else [("", value)]
                for sub, number in group:
                    self._writer.add_scalar(f"{name}/{sub}" if sub else name, number, step)
            self._writer.flush()

    def text(self, step: int, name: str, text: str) -> None:
        if self._writer is not None:
            self._writer.add_text(name, f"```\n{text}\n```", step)

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """JSON has no other numbers, and no reader of a curve asks for them."""
    whole = {name: _finite(value) if isinstance(value, dict) else value for name, value in figures.items()}
    return {name: value for name, value in whole.items() if not isinstance(value, float) or math.isfinite(value)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one of a killed run may be cut."""
    found = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
