"""Parameters that enter the mathematics as values (initial weights, persistent tokens), as a module of their own.

ZeRO-3 gathers a parameter around the forward of the module that owns it and frees it afterwards; handing out
copies from a forward of their own keeps such values valid wherever they are used.
"""

from __future__ import annotations

from torch import Tensor, nn


class Learned(nn.Module):
    """Holds tensors as parameters named value_0, value_1, ...; calling it returns copies."""

    def __init__(self, *values: nn.Parameter) -> None:
        super().__init__()
        self.count = len(values)
        for n, value in enumerate(values):
            self.register_parameter(f"value_{n}", value)

    def forward(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"value_{n}").clone() for n in range(self.count))
