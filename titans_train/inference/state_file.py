"""The file of a reading: read a long document once, go on from it at any time, in any number of ways.

It holds the carried state (models/state.py), the logits of the next token, the tokens seen, the random numbers' state,
a fingerprint of the parameters and a hash of all that, and is checked against the model before anything is computed
with it.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_train import outputs
from titans_train.errors import UserError
from titans_train.inference.sampling import Reading
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState, load_tensor
from titans_train.models.stored import fingerprint
from titans_train.models.tree import tensors_of


def check_place(path: Path) -> None:
    """UserError where no state can be saved, before hours of reading; leaves nothing."""
    outputs.check_place("--save-state", path)
    beside = _beside(path)
    try:
        beside.touch()
        beside.unlink()
    except OSError as error:
        raise UserError(f"--save-state {path} cannot be written ({error.strerror}); name another file") from error


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def save_reading(
    path: Path, reading: Reading, model: LanguageModel,
    random: torch.Generator | None = None, weights: Tensor | None = None,
) -> None:  # fmt: skip
    """weights: the model's fingerprint, where it is known already. UserError: the file cannot be written.

    Written beside and renamed, so that an earlier file stays whole if the disk is full.
    """
    beside = _beside(path)
    random = torch.Generator().manual_seed(0) if random is None else random
    extra = {"next_logits": reading.logits, "random": random.get_state()}
    extra["weights"] = fingerprint(model) if weights is None else weights
    if reading.seen is not None:
        extra["seen"] = reading.seen
    extra["content"] = _digest(reading, extra["random"], extra["weights"])
    try:
        reading.state.save(beside, model.shape, **extra)
        beside.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error}); free space or name another file") from error
    finally:
        beside.unlink(missing_ok=True)


def load_reading(
    path: Path, model: LanguageModel, random: torch.Generator | None = None, weights: Tensor | None = None
) -> Reading:
    """The reading of a state file; `random` goes on where it was. UserError names what does not fit."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; write one with --save-state")
    weights = fingerprint(model) if weights is None else weights
    try:
        reading = Reading(ModelState.load(path, model.shape), load_tensor(path, "next_logits"), _seen(path, model))
        found, state = load_tensor(path, "weights"), load_tensor(path, "random")
        _check(reading, model)
    except (UserError, OSError) as error:
        raise UserError(f"{error}; --load-state takes a file that generate saved with the same model") from error
    if found.dtype != weights.dtype or not torch.equal(found, weights):
        raise UserError(
            f"{path} was saved by another checkpoint: same architecture, other parameters; name the one that made it"
        )
    try:
        (torch.Generator() if random is None else random).set_state(state)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path} holds no state of torch's random numbers ({error}); give --seed") from error
    content = _optional(path, "content")
    if content is not None and not torch.equal(content, _digest(reading, state, found)):
        raise UserError(f"{path} is damaged: its content is not what was saved; read the text again for --load-state")
    return reading


def _digest(reading: Reading, random: Tensor, weights: Tensor) -> Tensor:
    """xxh3 of every number in the file, [16] uint8."""
    found = xxhash.xxh3_128()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{list(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, tuple):
            found.update(f"({len(value)}".encode())
            for part in value:
                add(part)
        elif is_dataclass(value):
            add(tuple(getattr(value, field.name) for field in fields(value)))
        else:
            found.update(f"{value};".encode())

    add((reading, random, weights))
    return torch.tensor(list(found.digest()), dtype=torch.uint8)


def _seen(path: Path, model: LanguageModel) -> Tensor | None:
    """None: a file from before the repetition penalty."""
    seen = _optional(path, "seen")
    if seen is None:
        return None
    if seen.dtype != torch.bool or seen.shape != (model.shape.vocabulary,):
        raise UserError(f"its seen tokens are {seen.dtype} {list(seen.shape)}, expected one bool per token id")
    return seen


def _optional(path: Path, name: str) -> Tensor | None:
    """A tensor that files of earlier versions do not have."""
    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor | None = file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        return tensor


def _check(reading: Reading, model: LanguageModel) -> None:
    """UserError for a state of several rows or another dtype than the model's, logits that are not this model's, or
    numbers that are not finite.
    """
    dtype, rows = next(model.parameters()).dtype, {tensor.shape[0] for tensor in tensors_of(reading.state)}
    dtypes = {tensor.dtype for tensor in tensors_of(reading.state)} - {torch.bool}
    if rows != {1} or dtypes != {dtype}:
        raise UserError(f"its state is {', '.join(map(str, dtypes))} of {rows} rows, expected {dtype} of one")
    logits, expected = reading.logits, (model.shape.vocabulary,)
    if logits.shape != expected or logits.dtype != dtype:
        raise UserError(f"its logits are {logits.dtype} {list(logits.shape)}, expected {dtype} {list(expected)}")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors_of(reading)):
        raise UserError("it holds numbers that are not finite: the file is damaged, or the model had diverged")
