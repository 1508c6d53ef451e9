"""Prints, as JSON, what each Triton kernel takes of a GPU, compiled for compute capability 9.0 without such a device.

{case: {kernel: {"shared": bytes of a chip's shared memory, "registers": of a thread, "stack": bytes of a thread that
did not fit into registers, "compiled": how often}}}.
Arguments: cases, with ";" between. The scan runs as on a GPU up to a kernel's launch, which compiles it
only: for the very tensors, numbers and absent pointers. With --again each case runs three times, with other numbers of
rows, chunks and tokens.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.memory.kernel_cases import cast
from tests.memory.test_scan import Case
from titans_train.memory import memory_scan, scan
from titans_train.memory.kernels import Chosen, coefficients, segment

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "64 x 64": ("tf32", {"chunk": 64, "d": 64, "documents": True}),
    "48 x 64": ("tf32", {"chunk": 48, "d": 64}),
    "64 of 256 x 64": ("tf32", {"chunk": 256, "d": 64, "documents": True}),
    "32 of 256 x 128, depth 1": ("tf32", {"chunk": 256, "d": 128, "depth": 1}),
    "exact, 32 of 64 x 64": ("ieee", {"chunk": 64, "d": 64}),
    "16 of 64 x 256": ("tf32", {"chunk": 64, "d": 256}),
    "exact, 16 of 64 x 256": ("ieee", {"chunk": 64, "d": 256}),
    "16 of 64 x 256, depth 1": ("tf32", {"chunk": 64, "d": 256, "depth": 1}),
    "48 x 64, depth 1": ("tf32", {"chunk": 48, "d": 64, "depth": 1, "norm": False}),
    "32 x 128": ("tf32", {"chunk": 32, "d": 128, "activation": "gelu"}),
    "32 x 128, depth 1": ("tf32", {"chunk": 32, "d": 128, "depth": 1, "norm": False, "documents": True}),
    "16 x 64": ("tf32", {"chunk": 16, "d": 64, "momentum": False}),
    "exact, 32 x 64": ("ieee", {"chunk": 32, "d": 64}),
    "exact, 32 x 128": ("ieee", {"chunk": 32, "d": 128}),
    "exact, 32 x 128, depth 1": ("ieee", {"chunk": 32, "d": 128, "depth": 1, "norm": False}),
    "small": ("tf32", {"chunk": 16, "d": 16, "documents": True}),
}


class Absent:
    """The driver of a GPU that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass
class Compiled:
    """In the place of a kernel: a launch compiles it, and notes what it takes."""

    kernel: Any
    found: dict[str, dict[str, int]]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **options)
            name = self.kernel.__name__ + "".join(f" {o.lower()}" for o in ("READ", "KEEP") if options.get(o))
            if name not in self.found:
                self.found[name] = {**usage(made.asm["cubin"]), "shared": made.metadata.shared}
            self.found[name]["compiled"] = len(self.kernel.device_caches[0][0])

        return launch


def usage(binary: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2])}


def compiled(precision: str, options: dict[str, Any], again: bool) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    names = {segment: ("scan_forward", "scan_backward"), coefficients: ("_forward", "_backward")}
    kernels = {(module, name): getattr(module, name) for module in names for name in names[module]}
    scan.choose = lambda *_: Chosen("triton", precision)  # type: ignore[assignment]
    try:
        for (module, name), kernel in kernels.items():
            kernel.device_caches.clear()
            setattr(module, name, Compiled(kernel, found))
        for batch, heads, chunks in [(2, 8, 4), (2, 1, 5), (2, 3, 7)] if again else [(2, 8, 4)]:
            case = Case(batch=batch, heads=heads, length=chunks * options["chunk"], **{"norm": True, **options})
            case.hidden = 4 * case.d
            cast(case.build(), torch.bfloat16 if precision == "tf32" else torch.float32)
            case.run(partial(memory_scan, kernels="triton", store_every=3))
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    driver.set_active(Absent())
    chosen = sys.argv[1].split(";")
    print(json.dumps({name: compiled(*CASES[name], "--again" in sys.argv) for name in chosen}))
