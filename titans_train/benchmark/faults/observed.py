"""`python -m titans_train …` with an eye on it: what the model is given, and file by file what is done to checkpoints.

Usage: python -m titans_train.benchmark.faults.observed WATCH.json train CONFIG.yaml …
WATCH: `notes`, a folder for what is seen; `checkpoints`, a folder; and, if something is to be done, `die`, `nan` or
`withhold`. Only calls of the model, of torch's optimiser and of the carried states are wrapped: the trainer is the one
that is shipped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
EVENTS = (
    "open",
    "os.listdir",
    "os.scandir",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
)


class Notes:
    """A line of JSON for each thing seen, written at once."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = os.open(folder / f"{name}-{RANK}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

    def write(self, **row: Any) -> None:
        os.write(self._file, (json.dumps(row) + "\n").encode())


class Files:
    """Counts what this process does to files of checkpoints, from the first that names `after` on; dies at one."""

    def __init__(self, notes: Notes | None, folder: str, die: dict[str, Any]) -> None:
        self.notes, self.folder, self.die = notes, folder, die
        self.after, self.until = die.get("after", ""), die.get("number", -1) if die.get("rank") == RANK else -1
        self.count, self.begun, self.within = 0, not self.after, threading.local()

    def start(self) -> None:
        sys.addaudithook(self._hear)
        flush = os.fsync

        def fsync(fd: Any) -> None:
            number = fd if isinstance(fd, int) else fd.fileno()
            self.event("fsync", f"/proc/self/fd/{number}", link=True)
            flush(fd)

        os.fsync = fsync

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or getattr(self.within, "event", False):
            return
        named = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
        folders = [a for a in arguments[1:] if isinstance(a, int) and a > 2]  # a name may be relative to one
        if named:
            self.within.event = True
            try:
                path = os.fsdecode(named[0])
                if event in ("os.remove", "os.rmdir") and folders and not os.path.isabs(path):
                    path = os.path.join(os.readlink(f"/proc/self/fd/{folders[0]}"), path)
                mode = f"open {arguments[1]}" if event == "open" else event.removeprefix("os.")
                self.event(mode, path)
            except OSError:
                pass
            finally:
                self.within.event = False

    def event(self, what: str, path: str, link: bool = False) -> None:
        if link:
            self.within.event = True
            path = os.readlink(path)
            self.within.event = False
        if not path.startswith(self.folder):
            return
        self.begun = self.begun or self.after in path
        if not self.begun:
            return
        if self.count == self.until:
            die(self.die["all"])
        self.count += 1
        if self.notes is not None:
            self.notes.write(event=what, path=os.path.relpath(path, self.folder))


def die(everyone: bool) -> None:
    """Without a word, as if killed by the kernel: this rank, or the launcher and all its ranks at once."""
    if everyone:
        parent = os.getppid()
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            others = [int(pid) for pid in file.read().split() if int(pid) != os.getpid()]
        for pid in (parent, *others):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class Steps:
    """Notes each batch that the model learns from, and spoils or withholds one step."""

    def __init__(self, notes: Notes | None, watch: dict[str, Any]) -> None:
        self.notes, self.nan, self.withhold = notes, watch.get("nan", {}), watch.get("withhold", {})
        self.per_step, self.seen, self.hooked = int(watch["per_step"]), 0, False

    @property
    def step(self) -> int:
        """Of this process: 1 for the first."""
        return (self.seen - 1) // self.per_step + 1

    @property
    def withheld(self) -> bool:
        return bool(self.withhold) and self.step == self.withhold["step"]

    def start(self) -> None:
        import torch

        from titans_train.models import LanguageModel
        from titans_train.training.carried import CarriedStates

        forward, update, after = LanguageModel.forward, torch.optim.AdamW.step, CarriedStates.after

        def noted(model: LanguageModel, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            if not (model.training and torch.is_grad_enabled()):
                return forward(model, tokens, *args, **kwargs)
            self.seen += 1
            if self.notes is not None:
                given = [tokens, kwargs.get("labels"), kwargs.get("document_starts")]
                digest = hashlib.sha256(b"|".join(b"" if t is None else t.numpy().tobytes() for t in given))
                self.notes.write(digest=digest.hexdigest()[:16], tokens=tokens.numel())
            out = forward(model, tokens, *args, **kwargs)
            if self.nan and self.nan["rank"] == RANK and self.step == self.nan["step"]:
                return self.spoiled(model, out)
            return out

        def updated(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.withheld:
                return None
            return update(optimizer, *args, **kwargs)

        def carried(states: CarriedStates, number: int, state: Any) -> None:
            before = states.states[number]
            after(states, number, state)
            if self.withheld:
                states.states[number] = before

        LanguageModel.forward = noted  # type: ignore[method-assign, assignment]
        torch.optim.AdamW.step = updated  # type: ignore[method-assign, assignment]
        CarriedStates.after = carried  # type: ignore[method-assign, assignment]

    def spoiled(self, model: Any, out: Any) -> Any:
        """The loss; or the gradient of one parameter only, while the loss stays what it is."""
        if self.nan["what"] == "loss":
            return dataclasses.replace(out, loss_sum=out.loss_sum * float("nan"))
        if not self.hooked:
            self.hooked = True
            parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
            parameter.register_hook(lambda g: g * float("nan") if self.step == self.nan["step"] else g)
        return out


def main(watching: Path, arguments: list[str]) -> int:
    watch = json.loads(watching.read_text())
    folder = Path(watch["notes"]) if watch.get("notes") else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    Files(Notes(folder, "files") if folder else None, watch["checkpoints"], watch.get("die", {})).start()
    Steps(Notes(folder, "steps") if folder else None, watch).start()
    from titans_train.__main__ import main as verb

    return verb(arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
