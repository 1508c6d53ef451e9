"""The neural memory as mathematics, per head, in plain PyTorch (Titans paper, section 3).

`recurrence` is the definition, token by token. `memory_scan` computes the same function chunk by chunk
with closed-form inner gradients and its own backward. No rank, group or collective belongs here.
"""

from titans_train.memory.recurrence import recurrence
from titans_train.memory.scan import memory_read, memory_scan
from titans_train.memory.state import MemoryState

__all__ = ["MemoryState", "memory_read", "memory_scan", "recurrence"]
