"""A small prepared folder and run configs over it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from data_prep.__main__ import main
from titans_train.config.schema import Attention, Data, Model, Recall, Run, RunConfig, Source, Training

END = 256


def write_texts(folder: Path, documents: int = 60, seed: int = 0) -> None:
    """Texts of 1 to 900 bytes, some of exactly one and two alignment blocks (63 and 128 bytes)."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(documents):
        size = (63, 128, 1)[number] if number < 3 else rng.randrange(1, 900)
        (folder / f"{number:03}.txt").write_text("".join(rng.choices("abcdefgh \n", k=size)))


def prepare_folder(parent: Path, compression: str = "zstd", shard_size: int = 8192) -> Path:
    """A prepared folder of several shards."""
    write_texts(parent / "texts")
    prepare_texts(parent / "texts", parent / "prepared", compression, shard_size)
    return parent / "prepared"


def prepare_texts(texts: Path, output: Path, compression: str = "zstd", shard_size: int = 8192) -> None:
    options = ["--validation-share", "0.2", "--shard-size", str(shard_size), "--compression", compression]
    assert main(["--input", str(texts), "--output", str(output), *options]) == 0


def prepare_sources(parent: Path) -> dict[str, Path]:
    """Three prepared folders, of 24 and more shards together, one of them a few documents only."""
    for seed, (name, documents) in enumerate({"web": 60, "code": 40, "books": 16}.items()):
        write_texts(parent / "texts" / name, documents, seed)
        prepare_texts(parent / "texts" / name, parent / name, "zstd" if name == "web" else "none", 4096)
    return {name: parent / name for name in ("web", "code", "books")}


WEIGHTS = {"web": 0.4, "code": 0.2, "books": 0.4}
LATER = {"web": 0.5, "code": 0.4, "books": 0.1}


def mixed_config(folders: dict[str, Path], runs: Path, change: int | None = 9, **options: Any) -> RunConfig:
    """Three sources, whose weights change after `change` steps."""
    config = run_config(None, runs, **options)
    sources = {name: Source(path=str(path), weight=WEIGHTS[name]) for name, path in folders.items()}
    later = None if change is None else {str(change + 1): LATER}
    return config.model_copy(
        update={"data": config.data.model_copy(update={"path": None, "sources": sources, "weights_from": later})}
    )


def run_config(
    path: Path | None,
    runs: Path,
    *,
    packing: str = "concatenate",
    shuffle: bool = True,
    workers: int = 0,
    length: int = 128,
    micro: int = 2,
    steps: int = 24,
    vocabulary: int = 257,
    seed: int = 0,
    recall: Recall | None = None,
    carry: bool = False,
    batch: int = 8,
) -> RunConfig:
    data = Data(
        source="shards" if recall is None else "recall",
        path=str(path) if path is not None else None,
        packing="isolate" if packing == "isolate" else "concatenate",
        shuffle=shuffle,
        workers=workers,
        recall=recall,
    )
    training = Training(
        steps=steps, sequence_length=length, global_batch_size=batch, micro_batch_size=micro, carry_state=carry
    )
    return RunConfig(
        run=Run(name="test", folder=str(runs), seed=seed),
        model=Model(block="transformer", layers=1, width=16, heads=2, vocabulary=vocabulary),
        attention=Attention(window=length // 2 if carry else None),
        data=data,
        training=training,
    )
