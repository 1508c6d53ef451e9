"""A model with the parameters that were stored: none is taken that is not the architecture's, by name and shape."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from titans_train.errors import UserError
from titans_train.models.language_model import LanguageModel
from titans_train.shape import ModelShape


class Stored(Protocol):
    """Whole parameters by name, wherever they lie."""

    @property
    def path(self) -> object: ...

    def names(self) -> list[str]: ...

    def shape_of(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, kind: str, name: str) -> Tensor: ...


def check(shape: ModelShape, stored: Stored) -> None:
    """UserError where other parameters are stored; takes no memory."""
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in LanguageModel(shape).named_parameters()}
    found = stored.names()
    if differing := sorted(wanted.keys() ^ set(found)):
        raise UserError(f"{stored.path} has other parameters than its model: {', '.join(differing[:4])[:200]}")
    for name in found:
        if stored.shape_of(name) != wanted[name]:
            raise UserError(f"{stored.path} has {name} as {stored.shape_of(name)}, its model as {wanted[name]}")


def build(shape: ModelShape, stored: Stored) -> LanguageModel:
    """On the CPU, fp32, in eval mode. UserError where other parameters are stored."""
    check(shape, stored)
    model = LanguageModel(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored.tensor("parameters", name))
    return model.eval()


def fingerprint(model: LanguageModel) -> Tensor:
    """sha256 of the parameters in the order of their names, as [32] uint8: the same however they were stored."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(f"{name} {list(parameter.shape)}".encode())
        found.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return torch.tensor(list(found.digest()), dtype=torch.uint8)
