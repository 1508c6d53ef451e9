"""Steps whose loss or gradient is not finite: what they were fed and what the memories did is kept, within a budget.

    <run>/nonfinite/step-N.json   gradient norm, learning rate; of each rank and micro-batch the ids of its samples and
                                  the loss per token; of each rank what its memory layers record on the same batches.
                                  "nan", "inf" and "-inf" are texts.

Nothing has moved in such a step, so the same forward can be made again, without gradients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from titans_train.data import Batch
from titans_train.data.sample import IGNORE
from titans_train.errors import UserError
from titans_train.models import recording
from titans_train.parallel import Engine, Mesh, agree, gather
from titans_train.training.carried import CarriedStates
from titans_train.training.progress import Progress
from titans_train.training.step import StepResult, forward

WINDOW = 1000  # steps that a budget is for


class NonFinite:
    """Writes their files, and ends a run that has too many of them."""

    def __init__(self, run_directory: Path, budget: int, mesh: Mesh) -> None:
        self.folder, self.budget, self.mesh = run_directory / "nonfinite", budget, mesh

    def passed_over(
        self,
        progress: Progress,
        engine: Engine,
        batches: list[Batch],
        result: StepResult,
        learning_rate: float,
        carried: CarriedStates | None,
    ) -> str:
        """After a step that was not applied, which `progress` counts: writes its file; a line about it. Collective.

        UserError, on all ranks, where the budget is spent.
        """
        step = progress.step
        own: dict[str, Any] = {
            "losses": _losses(batches, result),
            "sample_ids": [batch.sample_ids for batch in batches],
            "layers": layers(engine, batches, carried),
        }
        ranks = gather(own)
        norm = engine.gradient_norm()
        path = self.folder / f"step-{step}.json"
        odd = [rank for rank, r in enumerate(ranks) if not all(math.isfinite(x) for x in r["losses"])]
        what = f"the loss of rank {', '.join(map(str, odd))}" if odd else "the gradient (all losses are finite)"
        record = {
            "step": step, "gradient_norm": norm, "learning_rate": learning_rate, "ranks_with_nonfinite_loss": odd,
            "ranks": {str(rank): r for rank, r in enumerate(ranks)},
        }  # fmt: skip
        failure = agree(lambda: _write(path, record), self.mesh, first_only=True)
        where = failure or f"its samples and memory statistics are in {path}"
        line = f"step {step}: {what} is not finite; nothing was changed by this step; {where}"
        count = sum(skipped > step - WINDOW for skipped in progress.skipped)
        if count > self.budget:
            raise UserError(
                f"{line}. That makes {count} of the last {min(step, WINDOW)} steps, and training.skip_nonfinite allows "
                f"{self.budget}; lower optimizer.learning_rate or memory.theta_max, or look at those samples. The run "
                "goes on from its last checkpoint, which is untouched", agreed=True,
            )  # fmt: skip
        return f"{line} ({count} of {self.budget} such steps that any {WINDOW} may have)"


def _losses(batches: list[Batch], result: StepResult) -> list[float]:
    """Per token, of this rank's share of each micro-batch."""
    valid = [max(int((batch.labels != IGNORE).sum()), 1) for batch in batches]
    return [total / count for total, count in zip(result.own_losses.tolist(), valid, strict=True)]


def layers(engine: Engine, batches: Iterable[Batch], carried: CarriedStates | None) -> dict[str, dict[str, float]]:
    """What this rank's memory layers record in a forward of its batches. Collective, as a forward is."""
    engine.model.eval()
    with torch.no_grad(), recording(engine.model) as records:
        for number, batch in enumerate(batches):
            forward(engine, batch, carried.before(number) if carried else None)
            engine.model.parts.finish()  # type: ignore[union-attr, operator]
    engine.model.train()
    return {f"layer_{n}": {key: float(value) for key, value in found.items()} for n, found in records.items()}


def _write(path: Path, record: dict[str, Any]) -> str | None:
    """None, or why it could not be: that alone is no reason to end a run."""
    half = path.with_name(f"{path.name}.half")
    try:
        path.parent.mkdir(exist_ok=True)
        half.write_text(json.dumps(strict(record), indent=1, allow_nan=False) + "\n")
        half.rename(path)
    except OSError as error:
        return f"{path} could not be written ({error})"
    return None


def strict(value: Any) -> Any:
    """For JSON, which has no numbers that are not finite: they become texts."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
