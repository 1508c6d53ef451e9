"""What a prepared folder holds besides shards: indexes, lengths, tokenizer, rejected records, report, manifest."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.arrange import folder_names
from data_prep.bad import FILE_NAME as REJECTED_NAME
from data_prep.bad import unnamed, write_rejected
from data_prep.columns import Columns
from data_prep.durable import whole_file
from data_prep.job import Job
from data_prep.manifest import SPLITS, VERSION, FileEntry, Manifest, SplitEntry, TokenizerEntry, describe_file
from data_prep.report import REPORT_NAMES, write_report
from data_prep.settings import token_dtype
from data_prep.shards import ShardRecord
from data_prep.sources import Unit
from data_prep.tokenizer import prepared_tokenizer
from data_prep.units import UnitRecord
from data_prep.work import Place, kept_tokenizer
from titans_train import __version__

LENGTHS_FILE = "lengths.npy"
INDEX_FILE = "index.json"


@dataclass(frozen=True)
class Sums:
    """Of the documents that were read, before duplicates were left out."""

    documents: int
    duplicates: int
    last_after: int | None  # documents read of the last unit, where --max-bytes ended the reading
    text_bytes: int


def make_manifest(
    job: Job, place: Place, units: Sequence[Unit], records: Sequence[UnitRecord], columns: Columns, sums: Sums,
    shards: Sequence[ShardRecord],
) -> Manifest:  # fmt: skip
    """Write all of it into the staging folder and describe the whole. `shards` are in the order of the plan."""
    lengths = _lengths(columns)
    splits = {
        split: {
            source: _split_entry(
                place.staging / split / source, values, text_bytes,
                [shard for shard in shards if (shard.split, shard.source) == (split, source)],
            )
            for source, (values, text_bytes) in sorted(lengths[split].items())
        }
        for split in SPLITS
    }  # fmt: skip
    rejected = write_rejected(place.staging / REJECTED_NAME, place.units, units, records, sums.last_after)
    report = {
        "files": len(job.files),
        "bytes": job.bytes,
        "records": sums.documents + sum(entry["records"] for entry in rejected.values()),
        "documents": sums.documents,
        "duplicates": sums.duplicates,
        "rejected": rejected,
        "left_out": job.left_out,
        "without_source": unnamed(place.units, records, sums.last_after) if job.read.source_field else 0,
        "source_names": _renamed(columns.source_names),
        "stopped_at_max_bytes": sums.last_after is not None,
    }
    manifest = Manifest(
        VERSION, _tokenizer_entry(job, place), token_dtype(job.tokenizer).name, __version__, job.wanted,
        report, splits,
    )  # fmt: skip
    write_report(place.staging, manifest, _both_splits(lengths))
    others = [describe_file(place.staging / name) for name in (REJECTED_NAME, *REPORT_NAMES)]
    return replace(manifest, others=tuple(others))


def _renamed(names: Sequence[str]) -> dict[str, str]:
    """Folder -> source name as the documents give it, where they differ."""
    return {folder: name for folder, name in zip(folder_names(names), names, strict=True) if folder != name}


SplitLengths = dict[str, dict[str, tuple[NDArray[np.int64], int]]]


def _lengths(columns: Columns) -> SplitLengths:
    """split -> source folder -> tokens of each document in order, and bytes of their text."""
    folders = folder_names(columns.source_names)
    group = np.where(columns.validation, len(folders), 0) + columns.source
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(2 * len(folders) + 1))
    result: SplitLengths = {split: {} for split in SPLITS}
    for index in np.flatnonzero(np.diff(starts)):
        rows = order[starts[index] : starts[index + 1]]
        entry = columns.tokens[rows].astype("<i8"), int(columns.text_bytes[rows].sum())
        result[SPLITS[index // len(folders)]][folders[index % len(folders)]] = entry
    return result


def _both_splits(lengths: SplitLengths) -> dict[str, NDArray[np.int64]]:
    sources = sorted({source for split in SPLITS for source in lengths[split]})
    return {
        source: np.concatenate([lengths[split][source][0] for split in SPLITS if source in lengths[split]])
        for source in sources
    }


def _split_entry(
    folder: Path, lengths: NDArray[np.int64], text_bytes: int, shards: Sequence[ShardRecord]
) -> SplitEntry:
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, lengths)
    index = {"version": 2, "shards": [shard.index for shard in shards]}
    return SplitEntry(
        documents=len(lengths),
        tokens=int(lengths.sum()),
        text_bytes=text_bytes,
        shards=tuple(shard.entry for shard in shards),
        index=_write(folder / INDEX_FILE, json.dumps(index, sort_keys=True).encode("utf-8")),
        lengths=_write(folder / LENGTHS_FILE, buffer.getvalue()),
    )


def _write(path: Path, data: bytes) -> FileEntry:
    with whole_file(path) as stream:
        stream.write(data)
    return FileEntry(path.name, len(data), xxhash.xxh64(data).hexdigest())


def _tokenizer_entry(job: Job, place: Place) -> TokenizerEntry:
    """With the copy of its file that the run has worked with."""
    tokenizer, copy = job.tokenizer, kept_tokenizer(place, job.tokenizer)
    file = None
    if copy is not None:
        file = describe_file(Path(shutil.copyfile(copy, place.staging / copy.name)))
    entry = TokenizerEntry(tokenizer.kind, tokenizer.sha256, tokenizer.vocabulary, tokenizer.end_of_document, file)
    prepared_tokenizer(entry, place.staging)  # PrepareError where it is not the same
    return entry
