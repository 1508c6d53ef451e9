"""Run under torchrun on 2 ranks by test_checkpoint.py: prints what the benchmark's comparison says of small errors.

Usage: known_worker.py FOLDER.
"""

from __future__ import annotations

import json
import sys

import torch

from titans_train.benchmark.checkpoint_state import STEP, Known, plan_of
from titans_train.parallel import process_group
from titans_train.training.loop import build_engine


def main(folder: str) -> None:
    with process_group() as mesh:
        plan = plan_of({"folder": folder, "layers": 1, "width": 32}, 1, 1, 2, "known")
        engine = build_engine(plan, mesh)
        known, found = Known(engine), {}
        known.set()
        found["set"] = known.difference()
        piece = engine.pieces.held()[-1]
        with torch.no_grad():  # one element, on one rank, of one kind
            engine.pieces.value("exp_avg_sq", piece)[-1] += 0.25 * mesh.rank
        found["one element"] = known.difference()
        known.forget()
        found["forgotten"] = known.difference()
        engine.restore(lambda kind, piece: known.values[kind, piece.name], STEP + 1)
        found["another step"] = known.difference()
        if mesh.is_first:
            sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
