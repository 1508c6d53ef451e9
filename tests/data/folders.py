"""Stores over prepared folders, and folders made from other ones, for tests."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_prep.manifest import FILE_NAME, Manifest, SplitEntry, describe_file
from tests.data.corpus import END
from titans_train.data.cache import Cache
from titans_train.data.remote import Remote
from titans_train.data.shards import ShardStore

QUICK = Remote(timeout_seconds=2, attempts=3)


def open_store(path: Path | str, work: Path, split: str = "train", source: str | None = None) -> ShardStore:
    """With its cache in work/cache."""
    return ShardStore(str(path), split, Cache(work / "cache"), source, QUICK)


def read_all(store: ShardStore) -> list[list[int]]:
    return [store.tokens(number, 0, int(length)).tolist() for number, length in enumerate(store.lengths())]


def texts_by_name(store: ShardStore, parent: Path) -> list[list[int]]:
    """What must be in the store, from the names of its documents and the text files that were prepared."""
    return [[*(parent / store.name(number)).read_bytes(), END] for number in range(store.documents)]


def copy_of(prepared: Path, work: Path) -> Path:
    return Path(shutil.copytree(prepared, work / "damaged"))


def flip(path: Path, place: float, bit: int = 0) -> None:
    """Flip one bit: at a byte offset (int; negative from the end) or a share of the file (float)."""
    data = bytearray(path.read_bytes())
    offset = int(place * len(data)) if isinstance(place, float) else place
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def read_manifest(folder: Path) -> Manifest:
    return Manifest.from_text((folder / FILE_NAME).read_text(), str(folder))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    (folder / FILE_NAME).write_text(manifest.to_text())


def with_entry(manifest: Manifest, entry: SplitEntry) -> Manifest:
    """The same manifest with another train/text."""
    return replace(manifest, splits={**manifest.splits, "train": {"text": entry}})


def merged(folders: dict[str, Path], target: Path) -> Path:
    """One prepared folder with several sources in each split."""
    splits: dict[str, dict[str, SplitEntry]] = {"train": {}, "validation": {}}
    for name, folder in folders.items():
        manifest = read_manifest(folder)
        for split, sources in manifest.splits.items():
            shutil.copytree(folder / split / "text", target / split / name)
            splits[split][name] = sources["text"]
    write_manifest(target, replace(manifest, splits=splits))
    return target


def many_shards(prepared_raw: Path, target: Path, count: int) -> Path:
    """A folder of `count` shards with the same content."""
    manifest, folder = read_manifest(prepared_raw), prepared_raw / "train" / "text"
    entry = manifest.splits["train"]["text"]
    first = entry.shards[0]
    (target / "train" / "text").mkdir(parents=True)
    shards = []
    for number in range(count):
        name = f"shard.{number:05}.mds"
        os.link(folder / first.raw.name, target / "train" / "text" / name)
        shards.append(replace(first, raw=replace(first.raw, name=name)))
    np.save(
        target / "train" / "text" / "lengths.npy", np.tile(np.load(folder / "lengths.npy")[: first.documents], count)
    )
    lengths = describe_file(target / "train" / "text" / "lengths.npy")
    totals = {"documents": count * first.documents, "tokens": count * first.tokens}
    write_manifest(target, with_entry(manifest, replace(entry, shards=tuple(shards), lengths=lengths, **totals)))
    return target
