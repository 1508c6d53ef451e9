"""titans_train/ending.py: in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, time
import torch
from titans_train.ending import leave

def work():  # comes back from PyTorch while the interpreter ends
    a = torch.ones(100)
    while True:
        a + a

def last():
    time.sleep(0.2)
    print("thread")

atexit.register(lambda: print("exit function", flush=True))
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
threading.Thread(target=last).start()
print("work")
leave(STATUS)
"""


@pytest.mark.parametrize("status", [0, 75])
def test_all_is_done_and_the_status_is_told_whatever_other_threads_do(status: int) -> None:
    command = [sys.executable, "-c", PROGRAM.replace("STATUS", str(status))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == status and done.stderr == ""
    assert done.stdout.split("\n") == ["work", "thread", "exit function", ""]
