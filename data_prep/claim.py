"""Whose an S3 output is while it is written: an object below it names the run, which looks at it before each upload.

A local output has a lock instead. The object's name begins with a dot: it is no part of what lies in the output.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.durable import read_json, write_json
from data_prep.errors import PrepareError
from data_prep.storage import delete, exists, join, read_bytes, write_bytes
from data_prep.storage_errors import StorageError

NAME = ".data_prep.json"
_SAVED = "claim.json"  # in the working folder: a run that goes on there knows its own


@dataclass(frozen=True)
class Claim:
    remote: str  # the output
    run: str
    host: str
    work: str

    @property
    def path(self) -> str:
        return join(self.remote, NAME)

    def check(self) -> None:
        """PrepareError when the output is another run's by now."""
        found = _read(self.path)
        if found is None:
            raise PrepareError(f"{self.path}, which keeps other runs away, was removed; run the same command again")
        if found.get("run") != self.run:
            raise PrepareError(_refusal(self, found))


def take(remote: str, work: Path, restart: bool) -> Claim:
    """Claim an output for the run of a working folder, before anything is written to it.

    PrepareError: another run has it. `restart` takes it from a run of this working folder that is not remembered.
    """
    mine = _saved(work)
    if mine is None or mine.remote != remote:
        mine = Claim(remote, secrets.token_hex(8), socket.gethostname(), str(work))
        write_json(work / _SAVED, asdict(mine))
    found = _read(mine.path)
    if found is not None and found.get("run") != mine.run:
        same_place = (found.get("host"), found.get("work")) == (mine.host, mine.work)
        if not (restart and same_place):
            raise PrepareError(_refusal(mine, found))
    write_bytes(mine.path, json.dumps(asdict(mine), sort_keys=True).encode("utf-8"))
    mine.check()  # two that took it at once: the first finds out here or before its next upload
    return mine


def release(work: Path) -> None:
    """Take back the claim of a working folder, where it still has one."""
    mine = _saved(work)
    if mine is None:
        return
    with contextlib.suppress(StorageError):  # what stays is in nobody's way once the manifest is there
        if (_read(mine.path) or {}).get("run") == mine.run:
            delete(mine.path)
    (work / _SAVED).unlink(missing_ok=True)


def is_others(remote: str, work: Path) -> bool:
    """Whether an output is claimed, and not for this working folder."""
    mine, found = _saved(work), _read(join(remote, NAME))
    return found is not None and (mine is None or found.get("run") != mine.run)


def _saved(work: Path) -> Claim | None:
    data = read_json(work / _SAVED)
    try:
        return Claim(**data) if isinstance(data, dict) else None
    except TypeError:
        return None


def _read(path: str) -> dict[str, Any] | None:
    """None where there is none; nothing is known of one that cannot be read."""
    if not exists(path):
        return None
    try:
        data = json.loads(read_bytes(path))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _refusal(mine: Claim, found: dict[str, Any]) -> str:
    return (
        f"another run is preparing {mine.remote}, on host {found.get('host', '?')} in {found.get('work', '?')}; wait "
        f"for it or name another --output. If it is gone for good, remove {mine.path} and run again"
    )
