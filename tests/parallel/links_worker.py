"""Run by torchrun on 2 ranks: what goes wrong between neighbours. Arguments: which ways. Prints each rank's errors."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch

from tests.models.shapes import tiny
from titans_train.models import LanguageModel
from titans_train.parallel import Mesh, make_parts, process_group
from titans_train.parallel.links import Label, Links, NeighbourError
from titans_train.parallel.shards import ShardSettings

STATE = torch.arange(6.0)


def say(line: str) -> None:
    """In one write: the ranks share the output, and print writes the line's end by itself where it is not buffered."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def exchange(mesh: Mesh, sent: Label, wanted: Label, like: torch.Tensor) -> list[torch.Tensor]:
    links = Links(mesh)
    if mesh.sequence_rank == 0:
        links.send("right", sent, [STATE])
        links.finish()
        return [STATE]
    return links.receive("left", wanted, [like])


def way(name: str, mesh: Mesh) -> None:
    state, window = Label(3, "state", 1), Label(3, "window")
    if name == "right":
        got = exchange(mesh, state, state, torch.empty(6))
        assert torch.equal(got[0], STATE)
        say(f"right: rank {mesh.rank} has it")
    elif name == "order":
        exchange(mesh, window, state, torch.empty(6))
    elif name == "direction":
        exchange(mesh, Label(3, "state", 1, gradient=True), state, torch.empty(6))
    elif name == "longer":  # expected than sent
        exchange(mesh, state, state, torch.empty(8))
    elif name == "shorter":
        exchange(mesh, state, state, torch.empty(2))
    elif name in ("hang", "die"):  # in the middle of a model's forward
        shape = tiny("mag", layers=3)
        model = LanguageModel(shape, make_parts(mesh, False, ShardSettings(12, pieces=2)))
        if mesh.sequence_rank == 0:
            model.blocks[1].register_forward_pre_hook(lambda *_: stop(name))
        model(torch.zeros(2, 12, dtype=torch.long))
        model.parts.finish()


def stop(how: str) -> None:
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def main(names: list[str]) -> None:
    with process_group(sequence=2, timeout=timedelta(seconds=4)) as mesh:
        for name in names:
            begun = time.monotonic()
            try:
                way(name, mesh)
            except NeighbourError as error:
                say(f"{name}: rank {mesh.rank} after {time.monotonic() - begun:.0f} s: {error}")
                if name in ("hang", "die"):
                    os._exit(1)  # without a last word to a rank that is gone


if __name__ == "__main__":
    main(sys.argv[1:])
