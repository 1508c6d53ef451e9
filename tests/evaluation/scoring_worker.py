"""Run under torchrun by test_scoring.py: scores on several layouts of 4 ranks. Usage: scoring_worker.py OUT."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.models.shapes import tiny
from titans_train.data import Sample
from titans_train.evaluation.scoring import Scorer, case_and_position_sums
from titans_train.models import LanguageModel
from titans_train.parallel import make_parts, mesh_of, process_group
from titans_train.parallel.shards import ShardSettings
from titans_train.shape import ModelShape

COUNT, LENGTH = 5, 30  # not a multiple of the segment, 8, nor of the batch
BLOCKS = ("transformer", "lmm", "mac", "mag", "lmm-gated_deltanet", "mal-rwkv7")
LAYOUTS = [(2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False), (1, 4, False), (1, 1, False)]
CASES = [(block, layout) for block in BLOCKS for layout in LAYOUTS]


def shape_of(block: str) -> ModelShape:
    return tiny(block, heads=2)


def sample(numbers: Sequence[int]) -> Sample:
    """Random tokens; a third of the places have labels, half of them the token itself, which tied heads say."""
    rows = [torch.randint(0, 29, (2, LENGTH), generator=torch.Generator().manual_seed(n)) for n in numbers]
    tokens = torch.stack([row[0] for row in rows])
    chance = torch.stack([row[1] for row in rows])
    labels = torch.where(chance % 2 == 0, tokens, chance).masked_fill(chance % 3 != 0, -100)
    return Sample(tokens, labels, None)


def main(out: Path) -> None:
    found = []
    with process_group() as world:
        for block, (tensor, sequence, share) in CASES:
            with mesh_of(tensor, sequence) as mesh:
                shards = ShardSettings(LENGTH, 1) if sequence > 1 else None  # the scorer sets the length
                torch.manual_seed(0)
                model = LanguageModel(shape_of(block), make_parts(mesh, share, shards)).double()
                scorer = Scorer(model, mesh, batch=2)
                cases, places = case_and_position_sums(scorer, COUNT, sample, LENGTH)
            layout = f"tensor {tensor}, sequence {sequence}, sequence parallel {share}"
            found.append({"block": block, "layout": layout, "cases": cases.tolist(), "places": places.tolist()})
        if world.is_first:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
