"""Checkpoints on disk, to read: one logical checkpoint, whatever the layout that wrote it or reads it.

    <run>/checkpoints/step-00000010/   rank-N.safetensors: pieces of parameters and moments, fp32, as rank N held them
                                       carried-N.safetensors: states of rows from N of the batch (training.carry_state)
                                       manifest.json: all else, with the size and sha256 of each file and of itself
    <run>/checkpoints/latest           the newest folder's name, for readers outside

manifest.json (manifest.py): step, optimizer_step (Adam's), tokens, validation_loss (of this step, or null), skipped
(steps), shape, config, layout, data (data/cursor.py), tokenizer {kind, sha256}, random (base64), tensors {name: {shape,
dim, sections}} (how ranks cut it), pieces {file: [[name, part, parts, start, count], ...]}, files {name: {bytes,
sha256}}, sha256.

Nothing is unpickled. checkpoint_saver.py writes, resume.py goes on from one, checkpoint_folder.py keeps and removes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_train.parallel.pieces import KINDS, Piece
from titans_train.parallel.split import Split
from titans_train.training.manifest import MANIFEST, DamagedCheckpoint, check_hashes, check_sizes, read_manifest

_FILE_NAME = re.compile(r"(rank-\d{5,}|carried-\d{8,})\.safetensors")


class Checkpoint:
    """A checkpoint's manifest and tensors, each put together from its pieces when it is asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[str, Any] = {}
        try:
            self._index = self._check()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DamagedCheckpoint(f"{path / MANIFEST} contradicts itself: {error!r}") from error

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> Checkpoint:
        """verify: read every file and compare its hash. DamagedCheckpoint names what is not as it was written."""
        checkpoint = cls(path, read_manifest(path))
        check_sizes(path, checkpoint.files)
        if verify:
            check_hashes(path, checkpoint.files, checkpoint.files)
        return checkpoint

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.manifest["files"]  # type: ignore[no-any-return]

    @property
    def carried(self) -> list[str]:
        """Files of carried states."""
        return [name for name in self.files if name.startswith("carried-")]

    def names(self) -> list[str]:
        """Of the parameters."""
        return list(self.manifest["tensors"])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return tuple(self.manifest["tensors"][name]["shape"])

    def tensor(self, kind: str, name: str) -> Tensor:
        """The whole parameter, or its moment, fp32 on the CPU. kind: "parameters", "exp_avg", "exp_avg_sq"."""
        split, shape = self._index[name][0][1].split, list(self.shape_of(name))
        if split is None:
            return self.read(kind, Piece(name, 0, None, 0, math.prod(shape))).view(shape)
        shape[split.dim] //= split.parts
        shares = [Piece(name, part, split, 0, math.prod(shape)) for part in range(split.parts)]
        return split.join([self.read(kind, share).view(shape) for share in shares])

    def read(self, kind: str, piece: Piece) -> Tensor:
        """The elements of a piece [count], cut as it says, however those who wrote had cut it."""
        if piece.split != self._index[piece.name][0][1].split:
            whole = self.tensor(kind, piece.name)
            share = whole if piece.split is None else piece.split.share(whole, piece.part)
            return share.reshape(-1)[piece.start : piece.end]
        overlapping = [
            (stored, self._slice(file, kind, stored))
            for file, stored in self._index[piece.name]
            if stored.part == piece.part and stored.start < piece.end and piece.start < stored.end
        ]
        out = torch.empty(piece.count)  # not before it is known that the files have as much
        for stored, values in overlapping:
            first, end = max(stored.start, piece.start), min(stored.end, piece.end)
            out[first - piece.start : end - piece.start] = values[first - stored.start : end - stored.start]
        return out

    def _slice(self, file: str, kind: str, stored: Piece) -> Any:
        """A safetensors slice: only what is taken of it is read."""
        try:
            if file not in self._files:  # pread: a mapped file that is cut meanwhile would end the process
                self._files[file] = safe_open(str(self.path / file), framework="pt", backend="pread")
            found = self._files[file].get_slice(f"{kind}/{stored.name}")
        except (SafetensorError, OSError) as error:
            raise DamagedCheckpoint(f"{self.path / file} cannot be read: {error}") from error
        if found.get_dtype() != "F32" or found.get_shape() != [stored.count]:
            raise DamagedCheckpoint(
                f"{self.path / file} has {kind}/{stored.name} as {found.get_dtype()} {found.get_shape()}, "
                f"the manifest says F32 [{stored.count}]"
            )
        return found

    def _check(self) -> dict[str, list[tuple[str, Piece]]]:
        """The pieces by parameter, which must cover each exactly; and every number within what the files can hold."""
        manifest, index = self.manifest, defaultdict(list)
        for file, pieces in manifest["pieces"].items():
            for name, part, parts, start, count in pieces:
                how = manifest["tensors"][name]
                split = Split(how["dim"], parts, tuple(how["sections"])) if parts > 1 else None
                index[name].append((file, Piece(name, part, split, start, count)))
        for name in [*self.files, *manifest["pieces"]]:
            if not _FILE_NAME.fullmatch(name) or name not in self.files:
                raise ValueError(f"{name!r} is no file of a checkpoint")
        if set(index) != set(manifest["tensors"]):
            raise ValueError(f"pieces and tensors differ: {sorted(set(index) ^ set(manifest['tensors']))[:4]}")
        room = sum(entry["bytes"] for entry in self.files.values())
        for name, how in manifest["tensors"].items():
            split = index[name][0][1].split
            elements, parts = math.prod(how["shape"]), split.parts if split else 1
            if elements * 4 * len(KINDS) > room or elements % parts:
                raise ValueError(f"{name} has the shape {how['shape']} in {parts} parts, the files {room:,} bytes")
            if split is not None:
                _check_split(name, split, how["shape"])
            index[name].sort(key=lambda found: (found[1].part, found[1].start))
            if list(_gaps([piece for _, piece in index[name]], parts, elements // parts)):
                raise ValueError(f"the pieces of {name} do not cover it exactly")
        return dict(index)


def _check_split(name: str, split: Split, shape: list[int]) -> None:
    if not 0 <= split.dim < len(shape):
        raise ValueError(f"{name} has no dimension {split.dim}")
    length = shape[split.dim]
    sections = split.sections or (length,)
    if sum(sections) != length or any(section % split.parts for section in sections):
        raise ValueError(f"{name}: {split} does not cut {shape}")


def _gaps(pieces: list[Piece], parts: int, size: int) -> Iterator[tuple[int, int]]:
    """(part, place) where sorted pieces leave a gap or overlap."""
    part, place = 0, 0
    for piece in pieces:
        if piece.part != part:
            if place != size:
                yield part, place
            part, place = part + 1, 0
        if (piece.part, piece.parts, piece.start) != (part, parts, place) or piece.count < 1:
            yield piece.part, piece.start
        place = piece.end
    if (part, place) != (parts - 1, size):
        yield part, place
