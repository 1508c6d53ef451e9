"""safetensors files that declare what they do not hold, and tensors that are not what their name says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hostile.refusals import DEEP, pickled, zipped


def container(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: length of the header, header, body."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# In place of a whole file. Each takes the path that must not come to be.
FILES: dict[str, Callable[[Path], bytes]] = {
    "a pickle": pickled,
    "an archive": lambda mark: zipped(pickled(mark)),
    "a pickle behind a header": lambda mark: container({"x": entry()}, pickled(mark)),
    "empty": lambda mark: b"",
    "seven bytes": lambda mark: bytes(7),
    "a header of 2^60": lambda mark: container({}, length=2**60),
    "a header of 2^64 - 1": lambda mark: container({}, length=2**64 - 1),
    "a header of 99 MB": lambda mark: container({}, length=99_000_000),
    "a header beyond the file": lambda mark: container({"x": entry()}, bytes(4), length=5_000),
    "a tensor beyond the file": lambda mark: container({"x": entry(shape=(2**40,), offsets=(0, 2**42))}, bytes(4)),
    "a shape beyond its bytes": lambda mark: container({"x": entry(shape=(2**40,))}, bytes(4)),
    "a product that wraps around": lambda mark: container({"x": entry(shape=(2**32, 2**32 + 1))}, bytes(4)),
    "offsets backwards": lambda mark: container({"x": entry(offsets=(4, 0))}, bytes(4)),
    "negative offsets": lambda mark: container({"x": entry(offsets=(-4, 0))}, bytes(4)),
    "a negative shape": lambda mark: container({"x": entry(shape=(-1,))}, bytes(4)),
    "overlapping tensors": lambda mark: container({"x": entry(), "y": entry()}, bytes(4)),
    "a hole": lambda mark: container({"x": entry(offsets=(8, 12))}, bytes(12)),
    "an unknown dtype": lambda mark: container({"x": entry(dtype="PICKLE")}, bytes(4)),
    "deep lists": lambda mark: container(DEEP.encode()),
    "not UTF-8": lambda mark: container(b'{"\xff": 1}'),
    "NaN": lambda mark: container(b'{"x": NaN}'),
    "a list": lambda mark: container([1, 2]),
    "zeros": lambda mark: bytes(10_000),
}


def rewritten(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The file with other tensors and the same metadata."""
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    tensors = load_file(str(path))
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(path), header.get("__metadata__"))


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    """The first tensor whose name contains `name`, in another dtype."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if name in key)
        tensors[key] = tensors[key].to(dtype)

    return change


def reshaped(name: str, shape: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in sorted(tensors) if name in key)
        tensors[key] = shape(tensors[key]).clone()

    return change
