"""Saving while training goes on: every rank writes its own part, the first publishes the whole.

    save()      every rank copies its pieces to host memory (the only wait); a thread writes them into step-N.tmp. That
                of the first rank waits for all parts, writes the manifest, renames step-N.tmp to step-N, moves the
                pointer, and removes old checkpoints: none of it waits for training
    follow()    once per step: what has become of it, on what all ranks have agreed on
    finish()    waits for the save under way

A save that fails on any rank is dropped on all, with a line; the checkpoints before it stay as they are.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from data_prep.durable import flush_folder
from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.data.cursor import record
from titans_train.errors import UserError
from titans_train.models.state import ModelState
from titans_train.parallel import Engine, Mesh, agree, gather
from titans_train.parallel.pieces import Piece
from titans_train.parallel.split import Split
from titans_train.plan import Plan
from titans_train.training import checkpoint_folder
from titans_train.training.carried import CarriedStates
from titans_train.training.checkpoint import Checkpoint
from titans_train.training.checkpoint_writer import Background, Copies, random_state, take_parts, write_part
from titans_train.training.manifest import FORMAT, write_manifest
from titans_train.training.progress import Progress

LAST_SECONDS = 3.0  # for a thread to end, where the launcher is about to end all ranks


class Saver:
    """What of a run is being saved. Every method but `wishes` is called by all ranks alike."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        data: TokenDataset | SyntheticDataset,
        mesh: Mesh,
        carried: CarriedStates | None,
        say: Callable[[str], None],
        saved_step: int = 0,
    ) -> None:
        self.engine, self.plan, self.data, self.mesh, self.carried, self.say = engine, plan, data, mesh, carried, say
        self.saved_step = saved_step  # of the newest checkpoint that is published
        self.blocked_seconds = 0.0  # that the last save has kept training waiting for
        self.seconds = 0.0  # from its begin to its publication; on the first rank
        self._copies = Copies(engine)
        self._work: Background | None = None  # the save under way
        self._step, self._started = 0, 0.0

    # ---- the three calls

    def save(self, progress: Progress, validation_loss: float | None = None) -> None:
        """Begins to save what the run is now. A save that is still under way is waited for. Collective.

        Where there is no room or the folder cannot be written to, a line says so and training goes on.
        """
        self.settle()
        self._started = time.perf_counter()
        self._step = progress.step
        make = partial(checkpoint_folder.begin, self.plan.run_directory, progress.step, self.plan.checkpoint_bytes)
        try:
            folder = agree(make, self.mesh, first_only=True)
        except UserError as error:
            self.say(f"the checkpoint of step {self._step} was not written: {error}")
            return
        pieces = self._copies.take()
        carried = None if self.carried is None else self.carried.snapshot()
        manifest = self._describe(progress, validation_loss)
        self._work = Background(partial(self._write, folder, pieces, carried, manifest))
        if not self.plan.config.checkpoint.asynchronous:
            self.settle()
        self.blocked_seconds = time.perf_counter() - self._started

    def wishes(self) -> dict[str, float]:
        """What this rank contributes to the decision of a step."""
        work = self._work
        return {"saving": float(work is not None and work.running), "unsaved": float(bool(work and work.error))}

    def follow(self, decision: dict[str, float]) -> None:
        """Learns what has become of the save under way."""
        if self._work is not None and (decision["unsaved"] or not decision["saving"]):
            self.settle()

    def finish(self) -> None:
        """Waits for the save under way. UserError, on all ranks, if the last one that was begun has failed."""
        self.settle()
        if self.saved_step != self._step and self._step:
            raise UserError(
                f"the checkpoint of step {self._step} could not be written (see above); the newest one in "
                f"{checkpoint_folder.checkpoint_folder(self.plan.run_directory)} is of step {self.saved_step}",
                agreed=True,
            )

    def leave(self, together: bool) -> None:
        """Training ends with an error: what is being written is published if it can be. together: on all ranks."""
        if together:
            self.settle()
        elif self._work is not None:
            self._work.wait(LAST_SECONDS)

    # ---- what they consist of

    def _write(
        self,
        folder: Path,
        pieces: list[Piece],
        carried: tuple[str, ModelState] | None,
        manifest: dict[str, Any],
        stop: Event,
    ) -> str | None:
        """In a thread: this rank's part; on the first rank then the whole. A note on what else went wrong."""
        write_part(folder, self.mesh.rank, self._copies.tensors, pieces, carried, self.plan.shape)
        if not self.mesh.is_first:
            return None
        write_manifest(folder, manifest | take_parts(folder, self.mesh.world_size, stop))
        Checkpoint.open(folder, verify=False)  # what is published can be read
        flush_folder(folder)
        checkpoint_folder.publish(folder)
        self.seconds = time.perf_counter() - self._started
        run = self.plan.run_directory
        try:
            checkpoint_folder.point_at(checkpoint_folder.checkpoint_path(run, manifest["step"]))
            checkpoint_folder.prune(run, self.plan.config.checkpoint)
        except OSError as error:
            return f"the pointer could not be moved, or old checkpoints not removed: {error}"
        return None

    def settle(self) -> None:
        """Waits until every rank's thread has ended, and says what has become of the save. Collective."""
        if (work := self._work) is None:
            return
        if not self.mesh.is_first:
            work.wait()
        if any(gather(work.error)):  # of the others, and perhaps of the first: it would wait for their parts
            work.stop.set()
        work.wait()
        errors = [error for error in gather(work.error) if error]
        self._work = None
        if not errors:
            self.saved_step = self._step
            if work.note:
                self.say(work.note)
            return
        before = f"the one of step {self.saved_step} is untouched" if self.saved_step else "there is none before it"
        self.say(f"the checkpoint of step {self._step} could not be written ({errors[-1]}); {before}")
        if self.mesh.is_first:
            shutil.rmtree(checkpoint_folder.temporary_path(self.plan.run_directory, self._step), ignore_errors=True)

    def _describe(self, progress: Progress, validation_loss: float | None) -> dict[str, Any]:
        """The manifest but for the files."""
        plan = self.plan
        return {
            "format": FORMAT, "step": progress.step, "optimizer_step": self.engine.optimizer_step(),
            "tokens": progress.sequences * plan.config.training.sequence_length,
            "validation_loss": validation_loss if validation_loss and math.isfinite(validation_loss) else None,
            "skipped": list(progress.skipped),
            "shape": plan.shape.to_dict(), "config": plan.config.model_dump(mode="json"),
            "layout": {"tensor": self.mesh.tensor, "sequence": self.mesh.sequence, "data": self.mesh.data,
                       "zero_stage": self.engine.stage},
            "data": record(progress.cursor, self.data.weights, self.data.fingerprints), "random": random_state(),
            "tokenizer": self.data.tokenizer,
            "tensors": {name: _cut(shape, split) for name, (shape, split) in self.engine.pieces.wholes().items()},
        }  # fmt: skip


def _cut(shape: tuple[int, ...], split: Split | None) -> dict[str, Any]:
    """How the manifest says which whole a parameter is, and how tensor ranks cut it."""
    dim, sections = (None, ()) if split is None else (split.dim, split.sections)
    return {"shape": list(shape), "dim": dim, "sections": list(sections)}
