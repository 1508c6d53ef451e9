"""titans_train/host.py: what the system sees of it."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from titans_train.host import flush_denormals

PROGRAM = """
import resource, sys, torch
from titans_train.host import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_num_threads(1)
if "keep" in sys.argv:
    keep_freed_memory()
for number in range(14):
    if number == 8:  # small ones have found their places between large ones
        before = faults()
    x = torch.ones(2**24)  # 64 MiB: glibc by itself keeps no more than 32
    del x
print(faults() - before)
"""


def faults(*how: str, **variables: str) -> int:
    """Pages that the system has to give while tensors come and go."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM, *how]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_tensor_takes_the_memory_of_the_last_one_unless_the_environment_says_otherwise() -> None:
    fresh = 6 * 2**24 * 4 // os.sysconf("SC_PAGE_SIZE")
    assert faults("keep") < fresh / 4
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="1048576") >= fresh


def test_numbers_below_the_least_normal_one_are_zero() -> None:
    flush_denormals()
    assert float(torch.tensor([1e-30]) * 1e-10) == 0
