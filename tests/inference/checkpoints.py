"""Checkpoint folders as training leaves them, of small untrained models."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_prep.manifest import TokenizerEntry
from data_prep.tokenizer import ByteTokenizer
from titans_train.config import RunConfig, dump_config
from titans_train.models import LanguageModel
from titans_train.plan import resolve_shape
from titans_train.training.manifest import FORMAT, sha256_of, write_manifest

BYTES = asdict(TokenizerEntry("bytes", ByteTokenizer.sha256, 257, 256, None))


def config(folder: Path, block: str = "mag", **sections: dict[str, Any]) -> RunConfig:
    """A run config of a tiny model over bytes; `sections` change keys."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "tiny", "folder": str(folder)},
        "model": {
            "block": block,
            "layers": 2,
            "width": 16,
            "heads": 2,
            "vocabulary": 264,
            "initializer_std": 0.3,
            "tied_head": False,
        },
        "memory": {"chunk_size": 4, "expansion": 2},
        "attention": {"persistent_tokens": 2},
        "data": {"path": "data/none"},
        "training": {"steps": 10, "sequence_length": 64, "global_batch_size": 2, "micro_batch_size": 2},
    }
    if block == "transformer":
        del values["memory"], values["attention"]
    elif block == "mac":
        values["attention"]["segment"] = 8
    elif block != "lmm":
        values["attention"]["window"] = 6
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return RunConfig.model_validate(values)


def write_checkpoint(
    run_config: RunConfig, step: int = 10, seed: int = 0, tokenizer: dict[str, Any] | None = BYTES
) -> Path:
    """<run>/checkpoints/step-N with random parameters and moments, as one process writes it; returns its path."""
    torch.manual_seed(seed)
    shape = resolve_shape(run_config)
    parameters = {name: value.detach() for name, value in LanguageModel(shape).named_parameters()}
    run = Path(run_config.run.folder) / run_config.run.name
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    tensors = {name: {"shape": list(value.shape), "dim": None, "sections": []} for name, value in parameters.items()}
    values = {f"parameters/{name}": value.reshape(-1).clone() for name, value in parameters.items()}
    for kind, scale in (("exp_avg", 1e-3), ("exp_avg_sq", 1e-6)):
        values |= {f"{kind}/{name}": scale * value.reshape(-1).square() for name, value in parameters.items()}
    file = folder / "rank-00000.safetensors"
    save_file(values, str(file))
    manifest = {
        "format": FORMAT, "step": step, "optimizer_step": step, "tokens": step * 128, "shape": shape.to_dict(),
        "tokenizer": tokenizer, "config": run_config.model_dump(mode="json"), "validation_loss": None, "skipped": [],
        "layout": {"tensor": 1, "sequence": 1, "data": 1, "zero_stage": 1}, "random": {},
        "data": {"batch_sizes": [[0, 2]], "weights": [[0, {"data": 1.0}]], "fingerprints": {"data": "0" * 16}},
        "tensors": tensors,
        "pieces": {file.name: [[name, 0, 1, 0, value.numel()] for name, value in parameters.items()]},
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}},
    }  # fmt: skip
    write_manifest(folder, manifest)
    (folder.parent / "latest").write_text(folder.name)
    (run / "config.yaml").write_text(dump_config(run_config))
    return folder
