"""Prints, as JSON, how far the scan in float32 is from float64, plain and by its kernels in Triton's interpreter.

{case: {"launches": kernels launched, "plain" | "triton": {result: norm of the difference over the norm}}}
"""

from __future__ import annotations

import json
import os

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch  # noqa: E402

from tests.memory.kernel_cases import counted_launches, errors, results  # noqa: E402
from tests.memory.test_scan import Case  # noqa: E402

CASES = {"depth 2": Case(length=70, chunk=16, d=16, hidden=32, norm=True, documents=True),
         "parts": Case(length=77, chunk=36, d=16, hidden=32, norm=True),
         "one chunk": Case(length=16, chunk=16, d=16, hidden=40, norm=True),
         "depth 1": Case(length=70, chunk=16, d=16, depth=1, norm=False, momentum=False)}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        exact = results(case.build(), torch.float64, "plain")
        with counted_launches() as launches:
            found[name] = {
                kernels: errors(results(case, torch.float32, kernels), exact) for kernels in ("plain", "triton")
            }
        found[name]["launches"] = len(launches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
