"""Prints, as JSON, the kernels that memory.kernels.Trial launches, for some memories, in Triton's interpreter."""

from __future__ import annotations

import json
import os

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

from dataclasses import replace  # noqa: E402

import torch  # noqa: E402

from tests.memory.kernel_cases import counted_launches  # noqa: E402
from tests.models.shapes import tiny  # noqa: E402
from titans_train.memory.kernels import Trial  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    memory = tiny("lmm").memory
    assert memory is not None
    found = []
    for changes, dtype, documents in [
        ({}, torch.float32, True),
        ({"momentum": False, "forgetting": False}, torch.bfloat16, False),
        ({"depth": 1, "residual_norm": False, "chunk_size": 5, "store_every": 4}, torch.bfloat16, True),
    ]:
        with counted_launches() as launches:
            Trial(replace(memory, **changes), 8, dtype, documents).run(torch.device("cpu"))
        found.append(launches)
    print(json.dumps(found))
