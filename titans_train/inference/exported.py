"""An exported model's folder, to read: what `generate` and `evaluate` need, and nothing that only training does.

    OUT/model.safetensors    whole parameters by name, F32 or BF16
    OUT/model.json           the architecture (titans_train.shape.ModelShape)
    OUT/config.yaml          the config of the run
    OUT/tokenizer.json       or tokenizer.model: of the training data; none for bytes
    OUT/README.md            how to load it
    OUT/export.json          step, tokens, dtype, run, tokenizer, {name: {bytes, sha256}} of the files, sha256 of itself

Nothing is unpickled; every file is compared with its hash before it is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.manifest import FileEntry, TokenizerEntry
from data_prep.manifest_checks import TOKENIZER_FILES, tokenizer_problems
from titans_train.config import load_config
from titans_train.errors import UserError
from titans_train.untrusted import parse_json, read_bounded

MANIFEST, WEIGHTS, SHAPE, CONFIG, README = "export.json", "model.safetensors", "model.json", "config.yaml", "README.md"
FORMAT = 1
DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16")}  # name -> torch's, safetensors'
REMEDY = "export it again: python -m titans_train export CHECKPOINT OUT"
_NAMES = {WEIGHTS, SHAPE, CONFIG, README, *TOKENIZER_FILES.values()}
_LARGEST_TEXT = 1 << 20  # bytes of a manifest and of a shape


def digest(manifest: dict[str, Any]) -> str:
    """sha256 of an export.json without its own."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Exported:
    """As `Checkpoint`: `path`, `manifest` (export.json with "shape" and "config" of the other files) and tensors."""

    def __init__(self, path: Path, manifest: dict[str, Any], tokenizer: TokenizerEntry | None) -> None:
        self.path, self.manifest, self.tokenizer = path, manifest, tokenizer

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Exported:
        """verify: compare the hash of every file. UserError names what is missing or not what an export holds."""
        try:
            manifest = parse_json(read_bounded(path / MANIFEST, _LARGEST_TEXT))
            if manifest["format"] != FORMAT or manifest["format"] is True:
                raise ValueError(f"its format is {str(manifest['format'])[:40]!r}, this version reads {FORMAT}")
            if manifest["sha256"] != digest(manifest):
                raise ValueError("its sha256 is not the one that it states")
            if manifest["dtype"] not in DTYPES:
                raise ValueError(f"its dtype is {str(manifest['dtype'])[:40]!r}, expected {' or '.join(DTYPES)}")
            if not all(type(manifest[key]) is int for key in ("step", "tokens")):
                raise ValueError("its step or tokens is no number")
            tokenizer = _tokenizer(manifest["tokenizer"])
            files = manifest["files"]
            if not {WEIGHTS, SHAPE, CONFIG} <= files.keys() <= _NAMES:
                raise ValueError(f"its files are {', '.join(sorted(files))[:200]!r}")
            sizes = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        except OSError as error:
            raise UserError(f"{path} is not a complete export: {error}; {REMEDY}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path / MANIFEST} is damaged: {error}; {REMEDY}") from error
        for name, (size, sha256) in sizes.items() if verify else ():
            _check_file(path / name, size, sha256)
        try:
            shape = parse_json(read_bounded(path / SHAPE, _LARGEST_TEXT))
        except (OSError, ValueError) as error:
            raise UserError(f"{path / SHAPE} cannot be read: {error}; {REMEDY}") from error
        config = load_config(path / CONFIG).model_dump(mode="json")
        return cls(path, {**manifest, "shape": shape, "config": config}, tokenizer)

    def names(self) -> list[str]:
        """Of the parameters."""
        with self._weights() as file:
            return list(file.keys())

    def shape_of(self, name: str) -> tuple[int, ...]:
        with self._weights() as file:
            found = file.get_slice(name)
            expected = DTYPES[self.manifest["dtype"]][1]
            if found.get_dtype() != expected:
                raise UserError(
                    f"{self.path / WEIGHTS} has {name} as {found.get_dtype()}, expected {expected}; {REMEDY}"
                )
            return tuple(found.get_shape())

    def tensor(self, kind: str, name: str) -> Tensor:
        """The parameter, fp32 on the CPU. UserError for another kind: Adam's moments are not exported."""
        if kind != "parameters":
            raise UserError(f"{self.path} is an export: it has no {kind}")
        self.shape_of(name)
        with self._weights() as file:
            tensor: Tensor = file.get_tensor(name).float()
            return tensor

    def _weights(self) -> Any:
        try:
            return safe_open(str(self.path / WEIGHTS), framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path / WEIGHTS} cannot be read: {error}; {REMEDY}") from error


def is_export(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _tokenizer(data: Any) -> TokenizerEntry | None:
    if data is None:
        return None
    file = None if data["file"] is None else FileEntry(**data["file"])
    entry = TokenizerEntry(**{**data, "file": file})
    if problem := next(tokenizer_problems(entry), None):
        raise ValueError(problem)
    return entry


def _check_file(path: Path, size: int, sha256: str) -> None:
    try:
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} is damaged: expected a file of {size:,} bytes; {REMEDY}")
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {REMEDY}") from error
    if found != sha256:
        raise UserError(f"{path} is damaged: sha256 {found[:16]}…, expected {sha256[:16]}…; {REMEDY}")
