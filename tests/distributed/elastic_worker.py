"""Run under torchrun by test_elastic.py: a real training that writes down each tensor its model is given.

Usage: elastic_worker.py CONFIG.yaml OUT KILL RANK [key.path=value ...]. At the first forward of step KILL (0: never)
rank RANK (-1: every rank) kills itself as the kernel would, without a word.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from titans_train.__main__ import main as verb
from titans_train.models import LanguageModel
from titans_train.training import loop


def main(config: str, out: Path, kill: int, victim: int, overrides: list[str]) -> int:
    rank, step = int(os.environ.get("RANK", "0")), 0
    one_step, forward = loop.Run._one_step, LanguageModel.forward

    @functools.wraps(one_step)
    def counted(self: loop.Run, batches: list[Any]) -> None:
        nonlocal step
        step = self.progress.step + 1
        one_step(self, batches)
        step = 0

    @functools.wraps(forward)
    def noted(self: LanguageModel, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if step and self.training:  # validation and samples do not count
            if step == kill and victim in (-1, rank):
                os.kill(os.getpid(), signal.SIGKILL)
            starts = kwargs.get("document_starts")
            row = {
                "step": step,
                "rank": rank,
                "tokens": tokens.tolist(),
                "labels": kwargs["labels"].tolist(),
                "starts": None if starts is None else starts.tolist(),
            }
            with out.with_name(f"{out.name}-{rank}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        return forward(self, tokens, *args, **kwargs)

    loop.Run._one_step, LanguageModel.forward = counted, noted  # type: ignore[method-assign]
    return verb(["train", config, *overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:]))
