"""The carried state of a whole model, and its file.

File format: safetensors. Tensors are named by their path ("blocks.0.memory.tails.1"); the metadata entry "tree"
is JSON with the same nesting, in which a dataclass is {"type": name, "fields": {...}}, and "shape" is the model's
architecture, which a reader must match.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_train.errors import UserError
from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.state import MemoryState
from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.mac import MACState
from titans_train.models.state_checks import problems
from titans_train.models.tree import map_tensors
from titans_train.shape import ModelShape, completed
from titans_train.untrusted import parse_json


@dataclass(frozen=True)
class ModelState:
    blocks: tuple[BlockState | MACState, ...]

    def save(self, path: str | Path, shape: ModelShape, **beside: Tensor) -> None:
        """`beside`: further tensors for the same file, read back with `load_tensor`."""
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in beside.items()}
        tree = _take_apart(self, "", tensors)
        save_file(tensors, str(path), metadata={"tree": json.dumps(tree), "shape": json.dumps(shape.to_dict())})

    @classmethod
    def load(cls, path: str | Path, shape: ModelShape) -> ModelState:
        """UserError if it is no state, or of another architecture (chunk size included). Its dtype stays."""
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if not {"tree", "shape"} <= metadata.keys():
                    raise UserError(f"{path} is not a saved model state (no tree and shape in its metadata)")
                saved = parse_json(metadata["shape"])
                differing = _differences(completed(saved) if isinstance(saved, dict) else {}, shape.to_dict())
                if differing:
                    raise UserError(f"{path} was saved by another model: {'; '.join(differing)}")
                state = _put_together(parse_json(metadata["tree"]), file)
        except UserError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a saved model state ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        if not isinstance(state, ModelState):
            raise UserError(f"{path} is not a saved model state: it holds a {type(state).__name__}")
        if problem := next(problems(state.blocks, shape), None):
            raise UserError(f"{path} is not a state of this model: {problem}")
        return state

    def detach(self) -> ModelState:
        state: ModelState = map_tensors(torch.Tensor.detach, self)
        return state


def load_tensor(path: str | Path, name: str) -> Tensor:
    """A tensor that was saved beside a state. UserError: there is none."""
    try:
        with safe_open(str(path), framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118
                raise UserError(f"{path} has no tensor {name!r}")
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except SafetensorError as error:
        raise UserError(f"{path} is not a saved model state ({error})") from error


TYPES: dict[str, Any] = {
    t.__name__: t for t in (ModelState, BlockState, MACState, AttentionState, MemoryLayerState, MemoryState)
}


def _differences(saved: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    out = []
    for key in sorted(saved.keys() | wanted.keys()):
        a, b = saved.get(key), wanted.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{str(key)[:40]} is {str(a)[:40]} in the file, {b} in this model")
    return out


def _take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, tuple):
        return [_take_apart(v, f"{name}.{n}" if name else str(n), tensors) for n, v in enumerate(value)]
    if is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        prefix = f"{name}." if name else ""
        return {
            "type": type(value).__name__,
            "fields": {k: _take_apart(v, prefix + k, tensors) for k, v in parts.items()},
        }
    assert value is None or isinstance(value, int)
    return value


def _put_together(tree: Any, file: Any) -> Any:
    if isinstance(tree, list):
        return tuple(_put_together(t, file) for t in tree)
    if isinstance(tree, dict):
        if "tensor" in tree:
            return file.get_tensor(tree["tensor"])
        return TYPES[tree["type"]](**{k: _put_together(v, file) for k, v in tree["fields"].items()})
    return tree
