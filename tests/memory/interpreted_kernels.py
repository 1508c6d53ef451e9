"""Prints, as JSON, how far flash-linear-attention's kernels are from scan.py in Triton's interpreter, on the CPU.

The interpreter needs help where kernels expect what only a compiler gives: times of configurations to choose between
(the first is taken), loop counters that are Triton's own numbers, and `tl.gather` by its name in another module (they
have another way without it).
"""

import builtins
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
warnings.simplefilter("ignore")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime.autotuner import Autotuner  # noqa: E402
from triton.runtime.interpreter import _implicit_cvt  # noqa: E402

from tests.memory.peer_cases import CASES, document_starts, errors, leaves  # noqa: E402
from titans_train.memory.peers import kernels  # noqa: E402


def tensor_range(*bounds: Any) -> Iterator[Any]:
    numbers = [int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds]
    theirs = any(isinstance(b, tl.tensor) for b in bounds)
    return (_implicit_cvt(i) if theirs else i for i in builtins.range(*numbers))


def prepare() -> None:
    Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
    del tl.gather
    for name in kernels.MODULES:
        kernels._function(name)
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            module.range = tensor_range  # type: ignore[attr-defined]


def main(dtypes: list[str]) -> None:
    """dtypes: of what the kernels multiply, float32 or float16; the interpreter cannot multiply bfloat16."""
    prepare()
    torch.set_num_threads(1)
    found = []
    for dtype in (getattr(torch, name) for name in dtypes):
        for rule, carried, documents in CASES:
            if carried != documents:
                continue  # half of them: an interpreter takes its time
            starts = document_starts() if documents else None
            given = leaves(rule, carried, dtype)
            far = errors(lambda t, s, d: kernels.fla_scan(t, s, d, dtype), given, starts, torch.float32, "cpu")  # noqa: B023
            found.append([rule, carried, documents, str(dtype), far])
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
