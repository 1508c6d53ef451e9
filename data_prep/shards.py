"""One MDS shard from the units' tokens, through streaming's own writer; then where it belongs.

Imports streaming, and with it torch, in the process that writes: nothing else of `data_prep` does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.arrange import shard_name
from data_prep.claim import Claim
from data_prep.durable import has_bytes, read_json, write_json
from data_prep.errors import PrepareError
from data_prep.manifest import FileEntry, ShardEntry, describe_file
from data_prep.pool import advance
from data_prep.settings import COMPRESSION
from data_prep.storage import join, upload
from data_prep.units import file_of

PRELOAD = "data_prep.preload"
COLUMNS = {"name": "str", "tokens": "bytes"}
HASH = "xxh64"


def head_bytes(compression: str, shard_size: int) -> int:
    """Bytes of a shard besides its samples: their number, one offset, and MDSWriter's settings as JSON."""
    config = {
        "column_encodings": list(COLUMNS.values()), "column_names": list(COLUMNS), "column_sizes": [None, None],
        "compression": COMPRESSION[compression], "format": "mds", "hashes": [HASH], "size_limit": shard_size,
        "version": 2,
    }  # fmt: skip
    return 4 + 4 + len(json.dumps(config, sort_keys=True))


@dataclass(frozen=True)
class ShardTask:
    """The documents of a shard: name, and where the tokens lie."""

    split: str
    source: str
    number: int
    names: list[str]
    units: np.ndarray[Any, Any]
    offsets: np.ndarray[Any, Any]  # in tokens
    tokens: np.ndarray[Any, Any]


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as it is remembered in the working folder."""

    split: str
    source: str
    number: int
    index: dict[str, Any]  # its entry in streaming's index.json
    tokens: int

    @property
    def entry(self) -> ShardEntry:
        raw, zipped = self.index["raw_data"], self.index["zip_data"]
        return ShardEntry(self.index["samples"], self.tokens, _file(raw), _file(zipped) if zipped else None)

    @property
    def name(self) -> str:
        return shard_name(self.split, self.source, self.number)

    @property
    def path(self) -> str:
        """Below the output."""
        return f"{self.split}/{self.source}/{self.entry.stored.name}"


def _file(data: dict[str, Any]) -> FileEntry:
    return FileEntry(data["basename"], data["bytes"], data["hashes"][HASH])


def record_path(records: Path, name: str) -> Path:
    return records / f"{name}.json"


def find_shard(records: Path, name: str) -> ShardRecord | None:
    """What an earlier run wrote, by its record; the shard itself is not looked at."""
    data = read_json(record_path(records, name))
    return ShardRecord(**data) if isinstance(data, dict) else None


def lies_there(record: ShardRecord, staging: Path, remote: dict[str, int] | None) -> bool:
    """Whether the shard is whole in the staging folder, or among the objects (path -> bytes) that were uploaded.

    Of objects only the size is compared: S3 checks their content itself, and the claim keeps other writers away.
    """
    stored = record.entry.stored
    if remote is not None:
        return remote.get(record.path) == stored.bytes
    path = staging / record.path
    return has_bytes(path, stored.bytes) and describe_file(path) == stored


@dataclass(frozen=True)
class ShardWriter:
    """Writes one shard into `staging`, or uploads it to the claimed output. Goes to worker processes."""

    units: Path  # the folder of intermediates
    records: Path
    staging: Path
    claim: Claim | None
    compression: str
    shard_size: int
    itemsize: int

    def __call__(self, task: ShardTask) -> ShardRecord:
        scratch = self.staging.parent / "writing" / f"{task.split}.{task.source}.{task.number}.{os.getpid()}"
        scratch.parent.mkdir(parents=True, exist_ok=True)
        try:
            index = self._write(task, scratch)
            record = ShardRecord(task.split, task.source, task.number, index, int(task.tokens.sum()))
            self._move(scratch, record)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        path = record_path(self.records, record.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(record))
        advance(record.tokens * self.itemsize, record.tokens)
        return record

    def _write(self, task: ShardTask, scratch: Path) -> dict[str, Any]:
        from titans_train.data.shim import import_streaming

        writer = import_streaming("streaming.base.format.mds.writer").MDSWriter(
            out=str(scratch), columns=COLUMNS, compression=COMPRESSION[self.compression], hashes=[HASH],
            size_limit=self.shard_size, max_workers=1,
        )  # fmt: skip
        writer.size_limit = None  # the plan has set the borders, and a document beyond the limit has its own shard
        try:
            for name, tokens in zip(task.names, self._tokens(task), strict=True):
                writer.write({"name": name, "tokens": tokens})
            writer.size_limit = self.shard_size  # as the shard's head states it
            writer.flush_shard()
        finally:
            writer.executor.shutdown(wait=True)
        if len(writer.shards) != 1:
            name = shard_name(task.split, task.source, task.number)
            raise PrepareError(f"streaming cut {name} into {len(writer.shards)} shards, expected 1; report this")
        index: dict[str, Any] = writer.shards[0]
        for data in (index["raw_data"], index["zip_data"]):
            if data:
                data["basename"] = data["basename"].replace("00000", f"{task.number:05}", 1)
        return index

    def _tokens(self, task: ShardTask) -> Sequence[bytes]:
        """The token bytes of each document."""
        found: list[bytes] = []
        borders = np.flatnonzero(np.diff(task.units)) + 1
        for rows in np.split(np.arange(len(task.units)), borders):
            path = file_of(self.units, int(task.units[rows[0]]), "tokens")
            with path.open("rb") as stream:
                for row in rows:
                    stream.seek(int(task.offsets[row]) * self.itemsize)
                    found.append(stream.read(int(task.tokens[row]) * self.itemsize))
                    if len(found[-1]) != int(task.tokens[row]) * self.itemsize:
                        raise PrepareError(f"{path} has lost its end; run the same command again, it is made anew")
        return found

    def _move(self, scratch: Path, record: ShardRecord) -> None:
        written = next(scratch.iterdir())
        if self.claim is not None:
            self.claim.check()
            upload(written, join(self.claim.remote, record.path))
            return
        with written.open("rb") as stream:
            os.fsync(stream.fileno())
        target = self.staging / record.path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(written, target)
