"""What is asked of the model during a training, on the training's own ranks: validation loss, needles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.errors import UserError
from titans_train.evaluation.grid import Findable, depths_of, grid, over_depths
from titans_train.evaluation.needles import NeedleTask
from titans_train.evaluation.needles_task import TokenNeedles
from titans_train.evaluation.perplexity import evaluate
from titans_train.evaluation.scoring import Scorer
from titans_train.parallel import Engine, Mesh
from titans_train.plan import Plan

Figures = dict[str, Any]
BYTES = ("bits_per_byte", "bytes", "bytes_by_average")  # of text; what there is of them


def validate(
    engine: Engine,
    dataset: TokenDataset | SyntheticDataset,
    sequences: int,
    micro_batch: int,
    mesh: Mesh,
    beat: Callable[[], object],
) -> Figures:
    """Over the first `sequences` of the dataset: loss (nats per token), perplexity, accuracy, bits per byte of text
    (`perplexity.evaluate`), and the loss by position in the context. `beat` is called before each forward.
    """
    found = evaluate(Scorer(engine, mesh, micro_batch, beat), dataset, sequences)
    figures = {f"validation_{name}": found[name] for name in ("loss", "perplexity", "tokens", "accuracy")}
    figures |= {f"validation_{name}": found[name] for name in BYTES if name in found}
    by_position = {f"to_{row['last'] + 1:07}": row["loss"] for row in found["by_position"]}
    return {**figures, "validation_by_position": by_position}


class NeedleChecks:
    """The section `evaluation` of the config, ready before the first step."""

    def __init__(self, plan: Plan, mesh: Mesh) -> None:
        """UserError: no haystack, a text too short for its needle, no tokenizer."""
        self.plan, self.mesh, self.settings = plan, mesh, plan.config.evaluation
        self.tasks: dict[str, Findable] = {}
        needles = self.settings.needles
        if self.settings.every is None or needles is None:
            return
        self.tasks = self._tasks()
        for task in self.tasks.values():
            for length in needles.lengths:
                task.check(length, needles.depths * needles.cases)

    def _tasks(self) -> dict[str, Findable]:
        from titans_train.data.dataset import tokenizer_of_data
        from titans_train.data.needles import NeedlesTask

        config, needles = self.plan.config, self.settings.needles
        assert needles is not None
        if config.data.source == "needles":
            assert config.data.needles is not None
            return {"tokens": TokenNeedles(NeedlesTask(config.data.needles), 0, config.model.vocabulary)}
        if config.data.source != "shards":
            raise UserError(f"evaluation.needles needs text, or data.source needles; it is {config.data.source}")
        haystack = None
        if needles.haystack is not None:
            try:
                haystack = Path(needles.haystack).expanduser().read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"evaluation.needles.haystack {needles.haystack} cannot be read: {error}") from error
        tokenizer = tokenizer_of_data(config)
        return {kind: NeedleTask(kind, tokenizer, haystack) for kind in needles.kinds}

    def due(self, step: int) -> bool:
        return bool(self.tasks) and self.settings.every is not None and step % self.settings.every == 0

    def run(self, engine: Engine, beat: Callable[[], object]) -> Figures:
        """{needles_KIND: {length: accuracy}}, on every rank."""
        needles, found = self.settings.needles, {}
        assert needles is not None
        scorer = Scorer(engine, self.mesh, self.plan.config.training.micro_batch_size, beat)
        for kind, task in self.tasks.items():
            rows = over_depths(grid(scorer, task, needles.lengths, depths_of(needles.depths), needles.cases))
            found[f"needles_{kind}"] = {f"at_{row['length']:07}": row["accuracy"] for row in rows}
        return found
