"""Counts the messages that really go out, with their bytes."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from titans_train.plan_messages import Messages

# c10d's operations: our name, and which argument is the whole tensor
OPERATIONS = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.send": ("send", 0),
}


class CountMessages(TorchDispatchMode):
    """Within `with CountMessages() as counted`: counted.messages. Other collectives raise: none should be there."""

    def __init__(self) -> None:
        super().__init__()
        self.messages = Messages()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).removesuffix(".default")
        if name in OPERATIONS:
            kind, whole = OPERATIONS[name]
            tensors = args[whole] if isinstance(args[whole], (list, tuple)) else [args[whole]]
            self.messages.add(kind, sum(t.numel() * t.element_size() for t in tensors))
        elif name.startswith("c10d") and name != "c10d.recv_":  # a receive is the other end of a send
            raise RuntimeError(f"{name} is a collective that nobody planned")
        return function(*args, **(kwargs or {}))
