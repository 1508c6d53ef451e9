"""The file of a reading: read a long document once, go on from it at any time, in any number of ways.

It holds the carried state (models/state.py), the logits of the next token, the tokens seen, the random numbers' state
and a fingerprint of the parameters, and is checked against the model before anything is computed with it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from titans_train.errors import UserError
from titans_train.inference.sampling import Reading
from titans_train.models import LanguageModel
from titans_train.models.state import ModelState, load_tensor
from titans_train.models.stored import fingerprint
from titans_train.models.tree import tensors_of


def save_reading(
    path: Path, reading: Reading, model: LanguageModel,
    random: torch.Generator | None = None, weights: Tensor | None = None,
) -> None:  # fmt: skip
    """weights: the model's fingerprint, where it is known already. UserError: the file cannot be written.

    Written beside and renamed, so that an earlier file stays whole if the disk is full.
    """
    beside = path.with_name(f".{path.name}.partial")
    random = torch.Generator().manual_seed(0) if random is None else random
    extra = {"next_logits": reading.logits, "random": random.get_state()}
    extra["weights"] = fingerprint(model) if weights is None else weights
    if reading.seen is not None:
        extra["seen"] = reading.seen
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
    return reading


def _seen(path: Path, model: LanguageModel) -> Tensor | None:
    """None: a file from before the repetition penalty."""
    with safe_open(str(path), framework="pt") as file:
        if "seen" not in file.keys():  # noqa: SIM118
            return None
        seen: Tensor = file.get_tensor("seen")
    if seen.dtype != torch.bool or seen.shape != (model.shape.vocabulary,):
        raise UserError(f"its seen tokens are {seen.dtype} {list(seen.shape)}, expected one bool per token id")
    return seen


def _check(reading: Reading, model: LanguageModel) -> None:
    """UserError for a state of several rows or another dtype than the model's, or logits that are not this model's."""
    dtype, rows = next(model.parameters()).dtype, {tensor.shape[0] for tensor in tensors_of(reading.state)}
    dtypes = {tensor.dtype for tensor in tensors_of(reading.state)} - {torch.bool}
    if rows != {1} or dtypes != {dtype}:
        raise UserError(f"its state is {', '.join(map(str, dtypes))} of {rows} rows, expected {dtype} of one")
    logits, expected = reading.logits, (model.shape.vocabulary,)
    if logits.shape != expected or logits.dtype != dtype:
        raise UserError(f"its logits are {logits.dtype} {list(logits.shape)}, expected {dtype} {list(expected)}")
