"""The mechanisms that `benchmark checkpoint` compares. All save the same state of an engine, and set it again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from titans_train.benchmark.checkpoint_dcp import Blocks, LoadPlan, SavePlan
from titans_train.benchmark.checkpoint_state import STEP, cut, whole_shapes
from titans_train.data import SyntheticDataset, TokenDataset
from titans_train.parallel import Engine, Mesh, agree
from titans_train.parallel.pieces import KINDS, Piece
from titans_train.plan import Plan
from titans_train.training.checkpoint_saver import Saver
from titans_train.training.manifest import sha256_of
from titans_train.training.progress import Progress
from titans_train.training.resume import resume


class Mechanism:
    """Every method is collective. Saves go to <run>/<round>; a load reads the last of them."""

    asynchronous = False
    unpickles = True
    hashes = False
    any_layout = True

    def __init__(self, engine: Engine, mesh: Mesh, plan: Plan, data: TokenDataset | SyntheticDataset) -> None:
        """plan: of the engine; its run is this mechanism's alone."""
        self.engine, self.mesh, self.plan, self.data = engine, mesh, plan, data
        self.last = 0  # the round that was saved last

    def save(self, number: int) -> None:
        """Returns when training could go on. number: of the round, from 1."""
        raise NotImplementedError

    def finish(self) -> None:
        """Returns when what was saved is complete and flushed to the disk."""

    def load(self) -> None:
        """Sets the engine's state to what was saved last."""
        raise NotImplementedError

    def path(self) -> Path:
        """Of the last save."""
        return self.plan.run_directory / f"{self.last}"

    def clear(self) -> None:
        """Removes all saves before the last."""
        if self.mesh.is_first:
            for path in self.plan.run_directory.iterdir():
                if path.is_dir() and path != self.path():
                    shutil.rmtree(path)
        dist.barrier()

    def close(self) -> None:
        """Lets go of what is kept from save to save."""

    def _next(self, number: int) -> Path:
        self.last = number
        if self.mesh.is_first:
            self.path().mkdir(parents=True)
        dist.barrier()
        return self.path()


class Ours(Mechanism):
    """training/checkpoint_saver.py: every rank writes its pieces; a load checks every hash, and reads what it needs."""

    asynchronous, unpickles, hashes = True, False, True

    def __init__(self, *of: Any, **more: Any) -> None:
        super().__init__(*of, **more)
        self.saver = Saver(self.engine, self.plan, self.data, self.mesh, None, print)

    def save(self, number: int) -> None:
        self.last = number
        self.saver.save(Progress(number, Progress.start(self.plan).cursor))

    def finish(self) -> None:
        self.saver.finish()

    def load(self) -> None:
        resume(self.engine, self.plan, self.data, self.mesh)

    def path(self) -> Path:
        return self.plan.run_directory / "checkpoints" / f"step-{self.last:08d}"

    def clear(self) -> None:
        """The run keeps only its newest."""


class OursSynchronous(Ours):
    """The same with checkpoint.asynchronous: false."""

    asynchronous = False


class Whole(Mechanism):
    """Whole tensors by name, gathered on the first rank, which writes one file. Every rank reads all of it."""

    unpickles, hashes = False, True

    def save(self, number: int) -> None:
        path, tensors = self._next(number), {}
        for kind in KINDS:
            for name, value in self.engine.parameters() if kind == "parameters" else self.engine.moments(kind):
                if self.mesh.is_first:
                    tensors[f"{kind}/{name}"] = value.detach().float().to("cpu", copy=True)
        if self.mesh.is_first:
            save_file(tensors, str(path / "state.safetensors"))
            flush(path)
            (path / "sha256").write_text(sha256_of(path / "state.safetensors"))
        dist.barrier()

    def load(self) -> None:
        file = self.path() / "state.safetensors"
        found = agree(lambda: sha256_of(file), self.mesh, first_only=True)
        if found != (self.path() / "sha256").read_text():
            raise RuntimeError(f"{file} is damaged")
        with safe_open(str(file), framework="pt", backend="pread") as stored:

            def read(kind: str, piece: Piece) -> Tensor:
                whole: Tensor = stored.get_tensor(f"{kind}/{piece.name}")
                return cut(whole, piece)

            self.engine.restore(read, STEP)


class DistributedCheckpoint(Mechanism):
    """torch.distributed.checkpoint.save, fed every rank's pieces as blocks of whole tensors."""

    def state(self, value: Callable[[str, Piece], Tensor], pieces: list[Piece]) -> dict[str, Any]:
        shapes = whole_shapes(self.engine)
        return {f"{kind}/{p.name}": Blocks(shapes[p.name], p, value(kind, p)) for p in pieces for kind in KINDS}

    def present(self) -> dict[str, Any]:
        return self.state(self.engine.pieces.value, self.engine.pieces.written())

    def save(self, number: int) -> None:
        path = self._next(number)
        checkpoint.save(self.present(), storage_writer=checkpoint.FileSystemWriter(path), planner=SavePlan())

    def load(self) -> None:
        pieces = self.engine.pieces.held()
        room = {(kind, p.name): torch.empty(p.count) for p in pieces for kind in KINDS}
        state = self.state(lambda kind, piece: room[kind, piece.name], pieces)
        checkpoint.load(state, storage_reader=checkpoint.FileSystemReader(self.path()), planner=LoadPlan())
        self.engine.restore(lambda kind, piece: room[kind, piece.name], STEP)


class DistributedCheckpointAsynchronous(DistributedCheckpoint):
    """async_save in a thread, with host memory that is kept from save to save and a process group of its own."""

    asynchronous = True

    def __init__(self, *of: Any, **more: Any) -> None:
        super().__init__(*of, **more)
        gpu = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        self.group = dist.new_group(backend="gloo")  # the thread's collectives are not to meet the training's
        self.future: Any = None

    def save(self, number: int) -> None:
        path = self._next(number)
        self.future = checkpoint.async_save(
            self.present(), storage_writer=checkpoint.FileSystemWriter(path), planner=SavePlan(),
            process_group=self.group, async_stager=self.stager,
        )  # fmt: skip

    def finish(self) -> None:
        self.future.result()
        dist.barrier()

    def close(self) -> None:
        self.stager.close()
        dist.destroy_process_group(self.group)


class DeepSpeed(Mechanism):
    """DeepSpeed's own engine.save_checkpoint, for the same layout only, its files flushed afterwards.

    On another layout they load only after its conversion to a universal checkpoint, a step for the user that unpickles,
    too, and needs every split described by patterns of names: it is not measured.
    """

    any_layout = False

    def save(self, number: int) -> None:
        self.last = number
        self.engine._engine.save_checkpoint(str(self.plan.run_directory), tag=str(number))

    def finish(self) -> None:
        dist.barrier()
        if self.mesh.is_first:
            flush(self.path())
        dist.barrier()

    def load(self) -> None:
        path, _ = self.engine._engine.load_checkpoint(str(self.plan.run_directory), tag=str(self.last))
        if path is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {self.path()}")
        if self.engine.stage in (1, 2):  # as its next step would: only then can the moments be read by parameter
            zero = self.engine._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


MECHANISMS: dict[str, type[Mechanism]] = {
    "ours": Ours,
    "ours-synchronous": OursSynchronous,
    "whole": Whole,
    "dcp": DistributedCheckpoint,
    "dcp-asynchronous": DistributedCheckpointAsynchronous,
    "deepspeed": DeepSpeed,
}


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
