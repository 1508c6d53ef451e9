"""Which elements of each parameter, and of Adam's moments, this rank's optimiser holds under DeepSpeed.

A piece is a flat range of one tensor-parallel share of a parameter, its elements in row-major order. At stage 0 every
rank holds whole shares; stages 1 and 2 lay a group's shares end to end and cut them into equal parts, so that a piece
may begin and end anywhere; stage 3 cuts each share. What is relied on in DeepSpeed is held by tests/training/
test_reshard.py: `_hp_mapping` (stages 1, 2), `safe_get_local_*` and `ds_tensor` (stage 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titans_train.parallel.mesh import Mesh
from titans_train.parallel.split import Split, split_of

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("parameters", *MOMENTS)


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + count) of share `part` of the parameter `name`, cut by `split`; None: of the whole."""

    name: str
    part: int
    split: Split | None
    start: int
    count: int

    @property
    def parts(self) -> int:
        return 1 if self.split is None else self.split.parts

    @property
    def end(self) -> int:
        return self.start + self.count


class Pieces:
    """The pieces of one rank, and the fp32 values behind them as flat views. Nothing here is collective."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, zero: Any, stage: int, mesh: Mesh) -> None:
        """optimizer: torch's; zero: DeepSpeed's around it."""
        self.base, self.zero, self.stage, self.mesh = optimizer, zero, stage, mesh
        self.parameters = dict(model.named_parameters())

    def held(self) -> list[Piece]:
        """All that this rank's optimiser needs to go on."""
        return [piece for name, p in self.parameters.items() if (piece := self._piece(name, p)).count > 0]

    def written(self) -> list[Piece]:
        """What this rank writes: all ranks together write each element once."""
        shared_elsewhere = self.mesh.tensor_rank > 0
        pieces = [p for p in self.held() if p.parts > 1 or not shared_elsewhere]
        if self.stage:
            return pieces
        ranks = self.mesh.data * self.mesh.sequence  # all hold the same: each writes an equal range
        rank = self.mesh.data_rank * self.mesh.sequence + self.mesh.sequence_rank
        cut = [(p, p.count * rank // ranks, p.count * (rank + 1) // ranks) for p in pieces]
        return [replace(p, start=first, count=end - first) for p, first, end in cut if end > first]

    def value(self, kind: str, piece: Piece) -> Tensor:
        """The elements of a piece [count], fp32: a view where they lie, to read or to set."""
        own = self._piece(piece.name, self.parameters[piece.name])
        return self._flat(kind, self.parameters[piece.name]).narrow(0, piece.start - own.start, piece.count)

    def _piece(self, name: str, parameter: nn.Parameter) -> Piece:
        split = split_of(parameter)
        return Piece(name, 0 if split is None else self.mesh.tensor_rank, split, *self._range(parameter))

    def _range(self, parameter: Any) -> tuple[int, int]:
        """(start, count) of what this rank holds of its share."""
        if self.stage == 0:
            return 0, parameter.numel()
        if self.stage == 3:
            size = parameter.ds_tensor.ds_numel  # the last rank's is padded
            start = size * self.zero._get_param_partition_rank(parameter)
            return start, max(0, min(size, parameter.ds_numel - start))
        if parameter._hp_mapping is None:  # all of it on other ranks
            return 0, 0
        address = parameter._hp_mapping.lp_fragment_address
        return address.start, address.numel

    def _flat(self, kind: str, parameter: Any) -> Tensor:
        key = None if kind == "parameters" else kind
        if self.stage == 0:
            value = parameter.detach() if key is None else self.base.state[parameter][key]
            return value.view(-1)  # type: ignore[no-any-return]
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            value = safe_get_local_optimizer_state(parameter, key) if key else safe_get_local_fp32_param(parameter)
            return value  # type: ignore[no-any-return]
        return parameter._hp_mapping.get_hp_fragment(key)  # type: ignore[no-any-return]

    def wholes(self) -> dict[str, tuple[tuple[int, ...], Split | None]]:
        """The whole shape of each parameter, and how tensor ranks cut it."""
        found = {}
        for name, p in self.parameters.items():
            split, shape = split_of(p), list(getattr(p, "ds_shape", p.shape))
            if split is not None:
                shape[split.dim] *= split.parts
            found[name] = (tuple(shape), split)
        return found

    def publish(self) -> None:
        """Makes the weights that the forward uses from the fp32 values that were set. Collective."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            self.zero._partition_all_parameters()
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self.zero.checkpoint_event_epilogue()  # gathers the small ones that stay whole
