"""Run under torchrun by test_perplexity.py: figures on layouts of 2 ranks. Usage: perplexity_worker.py FOLDER."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.data.corpus import run_config
from tests.models.shapes import tiny
from titans_train.data import open_dataset
from titans_train.evaluation.perplexity import evaluate
from titans_train.evaluation.scoring import Scorer
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh, make_parts, mesh_of, process_group
from titans_train.parallel.shards import ShardSettings

COUNT = 5  # a batch that is not full, on each layout


def figures(mesh: Mesh, folder: Path, batch: int) -> dict[str, float]:
    dataset = open_dataset(run_config(folder / "prepared", folder / "runs"), "validation")
    torch.manual_seed(0)
    shards = ShardSettings(dataset.length // mesh.sequence, 1) if mesh.sequence > 1 else None
    model = LanguageModel(tiny("lmm", vocabulary=264), make_parts(mesh, False, shards)).double()
    found = evaluate(Scorer(model, mesh, batch), dataset, COUNT)
    return {name: found[name] for name in ("loss", "tokens", "bytes", "bits_per_byte")}


def main(folder: Path) -> None:
    with process_group() as world:
        found = [figures(world, folder, 1)]  # two replicas
        for tensor, sequence, batch in ((2, 1, 2), (1, 2, 2), (1, 1, 4)):
            with mesh_of(tensor, sequence) as mesh:
                found.append(figures(mesh, folder, batch))
        if world.is_first:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
