"""Which document goes into which shard: duplicates, splits, sources and shard borders, from numbers alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.columns import Array, Columns
from data_prep.errors import PrepareError
from data_prep.manifest import SPLITS
from data_prep.settings import Settings
from data_prep.units import WHOLE_FILE

_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_LONGEST = 64
_POWERS = 10 ** np.arange(1, 19, dtype=np.int64)

# MDS, per sample: an offset in the shard's head, then the two sizes of "name" and "tokens".
SAMPLE_BYTES = 4 + 4 + 4


@dataclass(frozen=True)
class ShardPlan:
    """One shard: which rows of the columns, in order."""

    split: str
    source: str  # folder name
    number: int
    rows: NDArray[np.int64]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.source, self.number)


def shard_name(split: str, source: str, number: int) -> str:
    """A shard's place, as train/text/00012."""
    return f"{split}/{source}/{number:05}"


def rows_within(text_bytes: Array, limit: int | None) -> int:
    """How many documents fit before the one that would pass `limit` bytes of text."""
    if limit is None:
        return len(text_bytes)
    return int(np.searchsorted(np.cumsum(text_bytes, dtype=np.int64), limit, side="right"))


def later_copies(hash_high: Array, hash_low: Array) -> NDArray[np.bool_]:
    """True for each document whose hash an earlier one has."""
    order = np.lexsort((hash_low, hash_high))  # stable: of equal hashes the first in input order comes first
    copies = np.zeros(len(order), np.bool_)
    if len(order):
        high, low = hash_high[order], hash_low[order]
        copies[order[1:]] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    return copies


def folder_names(names: Sequence[str]) -> list[str]:
    """A safe folder name [A-Za-z0-9._-]{1,64} for each source name, different for different names in any case.

    A name that is safe stays. Others are spelled with "-"; where that meets another name, a hash is added. The order
    of the names does not matter.
    """
    spelled = {name: name if _SAFE.fullmatch(name) else _spell(name) for name in sorted(names)}
    groups: dict[str, list[str]] = {}
    for name, text in spelled.items():
        groups.setdefault(text.casefold(), []).append(name)
    hashed: list[str] = []
    for group in groups.values():
        keeper = next((name for name in group if spelled[name] == name), None)
        hashed += [name for name in group if len(group) > 1 and name != keeper]
    taken = {spelled[name].casefold() for name in spelled.keys() - set(hashed)}
    for name in hashed:
        for text in _with_hash(name, spelled[name]):
            if text.casefold() not in taken:
                break
        spelled[name] = text
        taken.add(text.casefold())
    return [spelled[name] for name in names]


def _with_hash(name: str, text: str) -> Iterator[str]:
    """Ever other ones, the first of them all but certain to be free."""
    for seed in itertools.count():
        suffix = xxhash.xxh64_hexdigest(name.encode("utf-8", "surrogatepass"), seed=seed)
        yield f"{text[: _LONGEST - 17]}-{suffix}"


def _spell(name: str) -> str:
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:_LONGEST]
    return text or "source"


def sample_bytes(columns: Columns, files: Sequence[str], itemsize: int) -> NDArray[np.int64]:
    """Bytes of each document in an MDS shard, its name (see `document_name`) and place in the head included."""
    file_bytes = np.array([len(name.encode("utf-8")) for name in files], np.int64)
    digits = 1 + np.searchsorted(_POWERS, columns.line, side="right")
    name = file_bytes[columns.file] + np.where(columns.line == WHOLE_FILE, 0, 1 + digits)
    return SAMPLE_BYTES + name + columns.tokens.astype(np.int64) * itemsize


def document_name(file: str, line: int) -> str:
    return file if line == WHOLE_FILE else f"{file}:{line}"


def shard_ends(sizes: NDArray[np.int64], limit: int) -> list[int]:
    """Where shards end that take documents in order while they fit `limit` bytes, and at least one each."""
    total = np.cumsum(sizes, dtype=np.int64)
    ends: list[int] = []
    start, used = 0, 0
    while start < len(sizes):
        end = max(start + 1, int(np.searchsorted(total, used + limit, side="right")))
        ends.append(end)
        start, used = end, int(total[end - 1])
    return ends


def plan_shards(columns: Columns, folders: Sequence[str], sizes: NDArray[Any], limit: int) -> Iterator[ShardPlan]:
    """All shards, by split, source folder and number. `limit`: bytes of samples in a shard."""
    sources = len(folders)
    group = np.where(columns.validation, sources, 0) + columns.source
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(2 * sources + 1))
    for index in sorted(range(2 * sources), key=lambda index: (index // sources, folders[index % sources])):
        rows = order[starts[index] : starts[index + 1]]
        begin = 0
        for number, end in enumerate(shard_ends(sizes[rows], limit)):
            yield ShardPlan(SPLITS[index // sources], folders[index % sources], number, rows[begin:end])
            begin = end


def check_first(columns: Columns, within: int, limit: int | None) -> None:
    """PrepareError where already the first document passes --max-bytes."""
    if len(columns) and not within:
        raise PrepareError(
            f"--max-bytes {limit}: the first document alone is longer, {int(columns.text_bytes[0]):,} bytes; give "
            "more, or leave it out for no limit"
        )


def check_counts(columns: Columns, settings: Settings, files: int) -> None:
    """PrepareError where nothing is left, or one split would be empty."""
    total, validation = len(columns), int(columns.validation.sum())
    if total == 0:
        raise PrepareError(f"the corpus is empty: {files} files, no text in them; name others with --input")
    counts = {"train": total - validation, "validation": validation}
    if min(counts.values()) == 0:
        empty = min(counts, key=lambda split: counts[split])
        raise PrepareError(
            f"too few documents for the split: of {total} documents {counts['train']} fell to train and "
            f"{counts['validation']} to validation at --validation-share {settings.validation_share}, so {empty} would "
            "be empty; give more documents, another share or another --seed"
        )
