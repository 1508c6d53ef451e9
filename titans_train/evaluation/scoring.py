"""What a model gives to the labels of sequences: the one pass that every evaluation is made of, on any layout.

Greedy text after a prompt equals an answer exactly if the likeliest token is the right one at each of its places, each
time with the answer before it: so nothing needs to be generated to be judged.

Shapes: B rows, L tokens of a sequence, of which a rank holds a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_train.data.sample import IGNORE, Sample
from titans_train.parallel import Mesh, sum_over_data
from titans_train.parallel.launch import device

PIECE = 4096  # tokens per forward: longer sequences go through in pieces, with the state carried, at constant memory


@dataclass(frozen=True)
class Scored:
    """Of one batch and one stretch of its positions on this rank."""

    rows: list[int]  # numbers of the sequences
    first: int  # position of the first column in the sequence
    labelled: Tensor  # [B, l] bool
    losses: Tensor  # [B, l] float32 or better, 0 where there is no label
    right: Tensor  # [B, l] bool


@dataclass(frozen=True)
class Scorer:
    """model: a LanguageModel, or an Engine with one, whose ranks all take part. batch: rows of a forward on a rank."""

    model: Any
    mesh: Mesh
    batch: int
    beat: Callable[[], object] = lambda: None  # called before each forward

    @property
    def module(self) -> Any:
        """The LanguageModel."""
        return getattr(self.model, "model", self.model)

    def unit(self) -> int:
        """Tokens that the length of a sequence must be a multiple of: over shards, whole chunks or segments of each."""
        shards, tensor = self.mesh.sequence, self.mesh.tensor
        whole = self.module.shape.document_alignment if shards > 1 else 1
        return shards * math.lcm(whole, tensor)

    def __call__(self, count: int, sample: Callable[[Sequence[int]], Sample]) -> Iterator[Scored]:
        """Scores of sequences 0 to count - 1, those of this rank. `sample`: of so many sequences, all of one length.

        Every rank runs the same number of forwards; one with fewer sequences repeats one, which does not count.
        """
        share = -(-count // self.mesh.data)
        own = [n for n in range(self.mesh.data_rank * share, (self.mesh.data_rank + 1) * share)]
        training = self.module.training
        self.module.eval()
        try:
            for first in range(0, share, self.batch):
                numbers = own[first : first + self.batch]
                numbers += [count] * (self.batch - len(numbers) if self.mesh.tensor > 1 else 0)
                given = sample([min(n, count - 1) for n in numbers])
                given.labels[torch.tensor([n >= count for n in numbers])] = IGNORE
                yield from self._batch(numbers, self._padded(given))
        finally:
            self.module.train(training)

    def _padded(self, given: Sample) -> Sample:
        extra = -given.tokens.shape[1] % self.unit()
        if not extra:
            return given
        starts = given.document_starts
        return Sample(
            F.pad(given.tokens, (0, extra)), F.pad(given.labels, (0, extra), value=IGNORE),
            None if starts is None else F.pad(starts, (0, extra)),
        )  # fmt: skip

    @torch.no_grad()  # inference tensors would stay in what ZeRO 3 gathers ahead, and end the training
    def _batch(self, rows: list[int], given: Sample) -> Iterator[Scored]:
        length, where, parts = given.tokens.shape[1], device(), self.module.parts
        with parts.sequences_of(length):
            own = [None if x is None else parts.shard(x) for x in (given.tokens, given.labels, given.document_starts)]
            tokens, labels, starts = own
            assert tokens is not None and labels is not None
            first = self.mesh.sequence_rank * (length // self.mesh.sequence)
            step = self._step(tokens.shape[1])
            state = None
            for begin in range(0, tokens.shape[1], step):
                cut = slice(begin, begin + step)
                self.beat()
                out = self.model(
                    tokens[:, cut].to(where), labels=labels[:, cut].to(where), state=state,
                    document_starts=None if starts is None else starts[:, cut].to(where),
                    return_state=begin + step < tokens.shape[1], scores=True,
                )  # fmt: skip
                parts.finish()
                state = out.state
                yield Scored(rows, first + begin, labels[:, cut].to(where) != IGNORE, out.losses, out.right)

    def _step(self, length: int) -> int:
        """Whole segments, so that a document may start where one does. A shard goes through at once."""
        if self.mesh.sequence > 1:
            return length
        align = math.lcm(self.module.shape.document_alignment, self.mesh.tensor)
        return max(PIECE // align, 1) * align


def case_sums(scorer: Scorer, count: int, sample: Callable[[Sequence[int]], Sample]) -> Tensor:
    """Of each of `count` sequences, on every rank: labelled tokens, right ones, summed losses: [count, 3] float64."""
    return case_and_position_sums(scorer, count, sample, 0)[0]


def case_and_position_sums(
    scorer: Scorer, count: int, sample: Callable[[Sequence[int]], Sample], length: int
) -> tuple[Tensor, Tensor]:
    """As above, of each sequence, and over all of them at each of the first `length` positions: [length, 3]."""
    cases = torch.zeros(count + 1, 3, dtype=torch.float64, device=device())  # the last: of rows that do not count
    positions = torch.zeros(length, 3, dtype=torch.float64, device=device())
    for scored in scorer(count, sample):
        right = scored.right & scored.labelled
        scores = torch.stack([scored.labelled.double(), right.double(), scored.losses.double()], -1)  # [B, l, 3]
        cases.index_add_(0, torch.tensor([min(n, count) for n in scored.rows], device=cases.device), scores.sum(1))
        here = scores.sum(0)[: max(length - scored.first, 0)]
        positions[scored.first : scored.first + len(here)] += here
    return sum_over_data(cases, scorer.mesh)[:count].cpu(), sum_over_data(positions, scorer.mesh).cpu()
