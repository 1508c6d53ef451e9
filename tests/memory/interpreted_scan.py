"""Prints, as JSON, how far the scan in float32 is from float64, plain and by its kernels in Triton's interpreter.

{case: {"launches": kernels launched, "plain" | "triton": {result: norm of the difference over the norm}}}
"""

from __future__ import annotations

import json
import os

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

from functools import partial  # noqa: E402

import torch  # noqa: E402

from tests.memory.test_scan import Case  # noqa: E402
from titans_train.memory import memory_scan  # noqa: E402
from titans_train.memory.kernels.segment import Launch  # noqa: E402

CASES = {"depth 2": Case(length=70, chunk=16, d=16, hidden=32, norm=True, documents=True),
         "depth 1": Case(length=70, chunk=16, d=16, depth=1, norm=False, momentum=False)}  # fmt: skip


def results(case: Case, dtype: torch.dtype, kernels: str) -> dict[str, torch.Tensor]:
    case.build()
    case.leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in case.leaves.items()}
    outputs, gradients = case.run(partial(memory_scan, kernels=kernels))
    return {**{f"output {i}": x for i, x in enumerate(outputs)}, **gradients}


def main() -> None:
    launches = 0
    forward = Launch._forward

    def counted(*args: object, **options: object) -> object:
        nonlocal launches
        launches += 1
        return forward(*args, **options)  # type: ignore[arg-type]

    Launch._forward = counted  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    found: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        exact, launches = results(case, torch.float64, "plain"), 0
        found[name] = {
            kernels: {
                result: float((x - exact[result]).detach().norm() / exact[result].detach().norm())
                for result, x in results(case, torch.float32, kernels).items()
            }
            for kernels in ("plain", "triton")
        }
        found[name]["launches"] = launches
    print(json.dumps(found))


if __name__ == "__main__":
    main()
