"""manifest.json of a checkpoint: what is in it, with the size and sha256 of each file and of itself.

Read as what a stranger may have written: bounded, strict JSON, every entry of the type that it is used as.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from data_prep.durable import whole_file
from titans_train.errors import UserError
from titans_train.untrusted import parse_json, read_bounded

MANIFEST = "manifest.json"
LARGEST = 1 << 30  # bytes
FORMAT = 2

Count = Annotated[int, Field(ge=0, lt=2**53)]


class DamagedCheckpoint(UserError):
    """Something of a checkpoint is missing, or is not what was written."""


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Tensor(_Entry):
    shape: list[Count]
    dim: Count | None
    sections: list[Count]


class _File(_Entry):
    bytes: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Data(_Entry):
    batch_sizes: list[tuple[Count, Annotated[int, Field(ge=1, lt=2**63)]]] = Field(min_length=1)  # of step 0, …
    weights: list[tuple[Count, dict[str, float]]]
    fingerprints: dict[str, str]

    @field_validator("batch_sizes")
    @classmethod
    def _in_order(cls, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
        steps = [step for step, _ in sizes]
        if steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError("their steps do not begin at 0 and rise")
        return sizes


class _Tokenizer(_Entry):
    kind: str
    sha256: str


class _Manifest(_Entry):
    format: Literal[2]
    step: Count
    optimizer_step: Count
    tokens: Count
    validation_loss: float | None
    skipped: list[Count]
    shape: dict[str, Any]
    config: dict[str, Any]
    layout: dict[str, Count]
    data: _Data
    tokenizer: _Tokenizer | None
    random: dict[str, str]
    tensors: dict[str, _Tensor]
    pieces: dict[str, list[tuple[str, Count, Annotated[int, Field(ge=1, lt=2**31)], Count, Count]]]
    files: dict[str, _File]
    sha256: str


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    with whole_file(folder / MANIFEST) as stream:
        stream.write(json.dumps({**manifest, "sha256": _digest(manifest)}, sort_keys=True, allow_nan=False).encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """That of a checkpoint's folder, if it is as it was written. DamagedCheckpoint says what is wrong.

    OSError where the disk cannot be read, or what has this name is no file.
    """
    try:
        content = read_bounded(path / MANIFEST, LARGEST)
        manifest = parse_json(content)
        _Manifest.model_validate_json(content)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DamagedCheckpoint(f"{path} is not a complete checkpoint: it has no {MANIFEST}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "its top"
        wrong = f"{place}: {first['msg']}"
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged, or of another version: {wrong}") from None
    except ValueError as error:
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: {str(error)[:200]}") from error
    if manifest["sha256"] != _digest(manifest):
        raise DamagedCheckpoint(f"{path / MANIFEST} is damaged: its sha256 is not the one that it states")
    return manifest  # type: ignore[no-any-return]


def check_sizes(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """DamagedCheckpoint unless a checkpoint's files are files, of the sizes that its manifest states."""
    for name, expected in files.items():
        try:
            found = (path / name).stat()
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path / name} is missing") from error
        if not stat.S_ISREG(found.st_mode):
            raise DamagedCheckpoint(f"{path / name} is not a file")
        if found.st_size != expected["bytes"]:
            sizes = f"{found.st_size:,} bytes, expected {expected['bytes']:,}"
            raise DamagedCheckpoint(f"{path / name} is damaged: {sizes}")


def check_hashes(path: Path, files: dict[str, dict[str, Any]], names: Iterable[str]) -> None:
    """DamagedCheckpoint unless these files of a checkpoint have the hashes that its manifest states."""
    for name in names:
        expected = files[name]["sha256"]
        try:
            found = sha256_of(path / name)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path / name} is missing") from error
        if found != expected:
            raise DamagedCheckpoint(f"{path / name} is damaged: sha256 {found[:16]}, expected {expected[:16]}")
