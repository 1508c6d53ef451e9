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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from titans_train.memory.layer import MemoryLayerState
from titans_train.memory.state import MemoryState
from titans_train.models.attention import AttentionState
from titans_train.models.blocks import BlockState
from titans_train.models.mac import MACState
from titans_train.models.tree import map_tensors
from titans_train.shape import ModelShape


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
        """Raises ValueError if the file belongs to another architecture (chunk size included)."""
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if not {"tree", "shape"} <= metadata.keys():
                raise ValueError(f"{path} is not a saved model state (no tree and shape in its metadata)")
            differing = _differences(json.loads(metadata["shape"]), shape.to_dict())
            if differing:
                raise ValueError(f"{path} was saved by another model: {'; '.join(differing)}")
            state = _put_together(json.loads(metadata["tree"]), file)
        assert isinstance(state, ModelState)
        return state

    def detach(self) -> ModelState:
        state: ModelState = map_tensors(torch.Tensor.detach, self)
        return state


def load_tensor(path: str | Path, name: str) -> Tensor:
    """A tensor that was saved beside a state."""
    with safe_open(str(path), framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118
            raise ValueError(f"{path} has no tensor {name!r}")
        tensor: Tensor = file.get_tensor(name)
        return tensor


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
            out.append(f"{prefix}{key} is {a} in the file, {b} in this model")
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
