"""One rank's part of a checkpoint: copied to host memory, then written, flushed and hashed by a thread."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from data_prep.durable import read_json, write_json
from titans_train.errors import UserError
from titans_train.models.state import ModelState
from titans_train.parallel import Engine
from titans_train.parallel.pieces import KINDS, Piece
from titans_train.shape import ModelShape
from titans_train.training.manifest import sha256_of


class Copies:
    """Host memory for what this rank writes of parameters and moments, taken once and used by every save."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tensors: dict[str, Tensor] = {}

    def take(self) -> list[Piece]:
        """Copies the present values. The only part of a save that training waits for."""
        pieces = self.engine.pieces.written()
        for piece in pieces:
            for kind in KINDS:
                value, key = self.engine.pieces.value(kind, piece), f"{kind}/{piece.name}"
                if key not in self.tensors:
                    self.tensors[key] = torch.empty(piece.count, dtype=torch.float32, pin_memory=value.is_cuda)
                self.tensors[key].copy_(value, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return pieces


class Background:
    """A piece of work in a thread. Its error is kept; nothing is raised in the thread.

    The work is given an event: once it is set, it should give up what it waits for.
    """

    def __init__(self, work: Callable[[Event], str | None]) -> None:
        self.note: str | None = None  # what the work returned
        self.error: str | None = None
        self.stop = Event()
        self._work = work
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.note = self._work(self.stop)
        except Exception as error:  # whatever it is, the other ranks must hear of it
            self.error = str(error) or repr(error)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)


def write_part(
    folder: Path,
    rank: int,
    copies: dict[str, Tensor],
    pieces: list[Piece],
    carried: tuple[str, ModelState] | None,
    shape: ModelShape,
) -> None:
    """Writes a rank's files into `folder`, and last their entries of the manifest. OSError and the like."""
    files, listed = {}, {}
    if pieces:
        name = f"rank-{rank:05d}.safetensors"
        save_file(copies, str(folder / name), metadata={"format": "pt"})
        files[name] = _flushed(folder / name)
        listed[name] = [[p.name, p.part, p.parts, p.start, p.count] for p in pieces]
    if carried is not None:
        name, state = carried
        state.save(folder / name, shape)
        files[name] = _flushed(folder / name)
    write_json(_part(folder, rank), {"files": files, "pieces": listed})


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part-{rank:05d}.json"


def take_parts(folder: Path, ranks: int, stop: Event) -> dict[str, dict[str, Any]]:
    """The entries "files" and "pieces" of all ranks, once each has written its own; their files are removed.

    Ranks need not be asked: what they write shows that they are done, whatever training does. UserError once `stop`.
    """
    found: dict[str, dict[str, Any]] = {"files": {}, "pieces": {}}
    for rank in range(ranks):
        while (part := read_json(_part(folder, rank))) is None:
            if stop.wait(0.05):
                raise UserError("another rank could not write its part")
        for key, entries in found.items():
            entries.update(part[key])
    for rank in range(ranks):
        _part(folder, rank).unlink()
    return found


def _flushed(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file that is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def random_state() -> dict[str, str]:
    """Of torch's generators on this rank, base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_state(states: dict[str, str]) -> None:
    """UserError for what is no state of a generator."""
    setters = {"cpu": torch.set_rng_state}
    if torch.cuda.is_available():
        setters["cuda"] = torch.cuda.set_rng_state
    for name in setters.keys() & states.keys():
        try:
            content = bytearray(base64.b64decode(states[name], validate=True))
            setters[name](torch.frombuffer(content, dtype=torch.uint8))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"the checkpoint's random state ({name}) is not one: {str(error)[:200]}") from error
