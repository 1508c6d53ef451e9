"""Prints, as JSON, how many bytes on chip each kernel takes, compiled for compute capability 9.0 without such a device.

{kernel: bytes}, for the largest chunk and head that shape.beyond_kernels allows, depth 2 with all that there is.
"""

from __future__ import annotations

import json
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titans_train.memory.kernels import backward, coefficients, forward
from titans_train.memory.kernels.segment import TILE

CHUNK, WIDTH = 64, 64
OPTIONS = {
    "BLOCK_T": CHUNK, "BLOCK_D": WIDTH, "BLOCK_H": TILE, "BLOCK": 2 * CHUNK, "DEEP": True, "MOMENTUM": True,
    "NORM": True, "GELU": False, "DOCUMENTS": True, "READ": True, "KEEP": True, "PRECISION": "tf32",
}  # fmt: skip
NUMBERS = {"length", "first", "chunks", "rows", "T", "D", "H"}


def compiled(kernel: Any) -> int:
    signature, constants = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in OPTIONS:
            signature[name], constants[(place,)] = "constexpr", OPTIONS[name]
        else:
            signature[name] = "i32" if name in NUMBERS else "*i1" if name == "starts" else "*fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 1})
    assert made.asm["cubin"]
    return int(made.metadata.shared)


if __name__ == "__main__":
    kernels = [forward.scan_forward, backward.scan_backward, coefficients._forward, coefficients._backward]
    print(json.dumps({f"{k.__module__.split('.')[-1]}.{k.__name__}": compiled(k) for k in kernels}))
