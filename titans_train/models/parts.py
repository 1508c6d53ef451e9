"""The pieces that differ between one device and many, and their form for one device.

A layer is split by head, and a feed-forward by hidden unit: what stands between a columns layer (its output split) and
a rows layer (its input split, its output summed) needs nothing from another device. Such a stretch is a region; values
enter and leave it by one of these ways:

    tokens   the residual stream, flat [N, D] with N = B L tokens (batch major); each device may hold a share of them
    whole    [B, T, D], complete on every device (MAC's attention output within a segment)
    heads    [B, T, H d] of this device's heads, read by a columns layer that needs those of all (MAC's read memory)
    fixed    learned tokens [P, D], the same on every device

`parallel/` brings the form for many devices; this one is its reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_train.models.cross_entropy import token_losses
from titans_train.models.neighbours import UNCUT, Neighbours

Way = Literal["tokens", "whole", "heads", "fixed"]
Sections = dict[str, int]  # outputs of a columns layer: name -> width over all devices, in order


class Parts(Protocol):
    def share(self, count: int) -> int:
        """How many of `count` heads (or units) this device has."""

    def parameter(self, value: Tensor, dim: int | None) -> nn.Parameter:
        """A parameter with this device's share of `value` along `dim`; None: all of it, shared by all devices.

        A model makes all its parameters here, or in the layers below: what devices share has partial gradients on
        each where they share the residual stream's tokens, and these are then completed.
        """

    def neighbours(self, layer: int) -> Neighbours:
        """What this layer exchanges with the other shards of its sequence."""

    def shard(self, x: Tensor) -> Tensor:
        """The tokens of this device's shard: [B, L] of whole sequences -> [B, its tokens]."""

    def finish(self) -> None:
        """After a backward, or a forward without one: waits until what was sent to other shards has arrived."""

    def columns(self, inputs: int, sections: Sections, std: float) -> nn.Module:
        """(x, way, only) -> {section: [..., its share]}; `only`: neighbouring sections, None: all."""

    def rows(self, inputs: int, outputs: int, std: float) -> nn.Module:
        """(x, way): [B, L, inputs (share)] -> tokens [N, outputs], or as `way` says [B, L, outputs]."""

    def table(self, vocabulary: int, padded: int, width: int, std: float) -> nn.Module:
        """Tokens [B, L] -> the residual stream [N, D]; with as_head, [N, D] -> logits [N, padded (share)]."""

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits as a table gives them, labels [N] with -100 ignored -> the sum, in float32 or better."""

    def token_scores(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As above -> cross-entropies [N], 0 where ignored; and whether the likeliest token (of equals the first) is
        the label, [N] bool."""

    def sequences_of(self, length: int) -> AbstractContextManager[None]:
        """Within, whole sequences have so many tokens; over shards, of which each has an equal share."""


def take(sections: Sections, only: Sequence[str] | None) -> tuple[int, list[str], list[int]]:
    """First row, names and widths of neighbouring sections."""
    names = list(sections)
    wanted = names if only is None else list(only)
    first = names.index(wanted[0])
    assert wanted == names[first : first + len(wanted)], f"{wanted} are no neighbours in {names}"
    return sum(sections[n] for n in names[:first]), wanted, [sections[n] for n in wanted]


def named(y: Tensor, names: list[str], widths: list[int]) -> dict[str, Tensor]:
    return dict(zip(names, y.split(widths, -1), strict=True))


class Columns(nn.Module):
    """One linear map for all that a region needs of its input."""

    def __init__(self, inputs: int, sections: Sections, std: float) -> None:
        super().__init__()
        self.sections = sections
        self.weight = nn.Parameter(torch.randn(sum(sections.values()), inputs) * std)

    def forward(self, x: Tensor, way: Way = "tokens", only: Sequence[str] | None = None) -> dict[str, Tensor]:
        first, names, widths = take(self.sections, only)
        weight = self.weight if only is None else self.weight[first : first + sum(widths)]
        return named(F.linear(x, weight), names, widths)


class Rows(nn.Module):
    def __init__(self, inputs: int, outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * std)

    def forward(self, x: Tensor, way: Way = "tokens") -> Tensor:
        y = F.linear(x, self.weight)
        return y.flatten(0, -2) if way == "tokens" else y


class Table(nn.Module):
    """The vocabulary's vectors: input embedding and, with as_head, output logits (one module, so ZeRO-3 sees both).

    Rows from `vocabulary` on are padding; their logits are -inf.
    """

    def __init__(self, vocabulary: int, padded: int, width: int, std: float) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.randn(padded, width) * std)

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        if not as_head:
            return F.embedding(x.flatten(), self.weight)
        return without_padding(F.linear(x, self.weight), self.vocabulary)


def without_padding(logits: Tensor, vocabulary: int) -> Tensor:
    """In place: -inf from there on. Their gradient is 0 by itself, so that autograd need not know, and copy it."""
    with torch.no_grad():
        logits[:, vocabulary:] = -torch.inf
    return logits


class SingleDevice:
    """Everything on one device."""

    def neighbours(self, layer: int) -> Neighbours:
        return UNCUT

    def shard(self, x: Tensor) -> Tensor:
        return x

    def finish(self) -> None:
        pass

    def share(self, count: int) -> int:
        return count

    def parameter(self, value: Tensor, dim: int | None) -> nn.Parameter:
        return nn.Parameter(value)

    def columns(self, inputs: int, sections: Sections, std: float) -> nn.Module:
        return Columns(inputs, sections, std)

    def rows(self, inputs: int, outputs: int, std: float) -> nn.Module:
        return Rows(inputs, outputs, std)

    def table(self, vocabulary: int, padded: int, width: int, std: float) -> nn.Module:
        return Table(vocabulary, padded, width, std)

    def cross_entropy_sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return token_losses(logits, labels).sum()

    def token_scores(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(logits, labels), logits.argmax(-1) == labels

    def sequences_of(self, length: int) -> AbstractContextManager[None]:
        return nullcontext()
