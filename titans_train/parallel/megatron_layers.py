"""The one adapter to megatron-core's layers: its parallel linears and vocabulary embedding.

With sequence parallelism each rank holds N / T of the N tokens of the residual stream, a contiguous share of the flat,
batch-major stream, so that no axis is moved. Collectives over the T tensor-parallel ranks, per call:

    way      columns, forward / backward               rows, forward / backward
    tokens   - / all-reduce                            all-reduce / -
      with sequence parallelism:
             all-gather / all-gather, reduce-scatter   reduce-scatter / all-gather
    whole    - / all-reduce                            all-reduce / -
    heads    all-gather / reduce-scatter               (no rows layer)
    fixed    - / all-reduce                            all-reduce / -
      with sequence parallelism:
             - / -                                     all-reduce / all-reduce

Relied on, and held by tests/parallel/test_contracts.py: with perform_initialization=False the layers draw nothing;
linear_with_grad_accumulation_and_async_allreduce gathers and scatters along dimension 0, and its backward gathers the
input again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    all_gather_last_dim_from_tensor_parallel_region,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor, nn

from titans_train.models.cross_entropy import token_losses
from titans_train.models.parts import Sections, Way, named, take, without_padding


def _config(weight: Tensor, ranks: dist.ProcessGroup, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=ranks.size(), sequence_parallel=sequence_parallel, use_cpu_initialization=True,
        perform_initialization=False, params_dtype=weight.dtype,
    )  # fmt: skip


class Columns(ColumnParallelLinear):
    """parts.Columns with this rank's share of the outputs. weight: [sum of shares, inputs]; sections: the shares."""

    def __init__(
        self, weight: nn.Parameter, sections: Sections, ranks: dist.ProcessGroup, sequence_parallel: bool
    ) -> None:
        outputs, inputs = weight.shape[0] * ranks.size(), weight.shape[1]
        super().__init__(
            inputs, outputs, config=_config(weight, ranks, sequence_parallel), init_method=nn.init.zeros_, bias=False,
            skip_weight_param_allocation=True, tp_group=ranks,
        )  # fmt: skip
        self.weight, self.sections = weight, sections

    def forward(self, x: Tensor, way: Way = "tokens", only: Sequence[str] | None = None) -> dict[str, Tensor]:
        first, names, widths = take(self.sections, only)
        weight = self.weight if only is None else self.weight[first : first + sum(widths)]
        if way == "heads":
            y = F.linear(all_gather_last_dim_from_tensor_parallel_region(x, group=self.tp_group), weight)
        elif way == "fixed" and self.sequence_parallel:
            y = F.linear(x, weight)  # the gradient stays partial, as that of every shared parameter
        else:
            shares = way == "tokens" and self.sequence_parallel
            y = linear_with_grad_accumulation_and_async_allreduce(
                x.flatten(0, -2), weight, None, gradient_accumulation_fusion=False, allreduce_dgrad=not shares,
                sequence_parallel=shares, tp_group=self.tp_group,
            )  # fmt: skip
            y = y if way == "tokens" else y.view(*x.shape[:-1], y.shape[-1])
        return named(y, names, widths)


class Rows(RowParallelLinear):
    """parts.Rows with this rank's share of the inputs. weight: [outputs, share]."""

    def __init__(self, weight: nn.Parameter, ranks: dist.ProcessGroup, sequence_parallel: bool) -> None:
        super().__init__(
            weight.shape[1] * ranks.size(), weight.shape[0], config=_config(weight, ranks, sequence_parallel),
            init_method=nn.init.zeros_, bias=False, input_is_parallel=True, skip_bias_add=False, tp_group=ranks,
        )  # fmt: skip
        self.weight = weight

    def forward(self, x: Tensor, way: Way = "tokens") -> Tensor:
        if way == "tokens":
            y: Tensor = super().forward(x.flatten(0, -2))[0]
            return y
        y = reduce_from_tensor_model_parallel_region(F.linear(x, self.weight), group=self.tp_group)
        if way == "fixed" and self.sequence_parallel:  # what comes back is partial
            y = copy_to_tensor_model_parallel_region(y, group=self.tp_group)
        return y


class Table(VocabParallelEmbedding):
    """parts.Table with this rank's share of the rows. weight: [share, width]."""

    def __init__(
        self, weight: nn.Parameter, vocabulary: int, ranks: dist.ProcessGroup, sequence_parallel: bool
    ) -> None:
        super().__init__(
            weight.shape[0] * ranks.size(), weight.shape[1], init_method=nn.init.zeros_,
            reduce_scatter_embeddings=sequence_parallel, config=_config(weight, ranks, sequence_parallel),
            tp_group=ranks,
        )  # fmt: skip
        self.weight = weight
        self.first_padding = max(0, vocabulary - self.vocab_start_index)
        self.to_logits = partial(
            linear_with_grad_accumulation_and_async_allreduce, bias=None, gradient_accumulation_fusion=False,
            allreduce_dgrad=not sequence_parallel, sequence_parallel=sequence_parallel, tp_group=ranks,
        )  # fmt: skip

    def forward(self, x: Tensor, as_head: bool = False) -> Tensor:
        if not as_head:  # [1, N] -> [1, N, D], or a share [N / T, 1, D]
            return super().forward(x.reshape(1, -1)).flatten(0, 1)
        return without_padding(self.to_logits(x, self.weight), self.first_padding)


def losses_of(logits: Tensor, labels: Tensor, ranks: dist.ProcessGroup) -> Tensor:
    """Cross-entropies [N] of logits [N, share]. (Megatron's own makes a float32 copy of them.)"""

    def combine(x: Tensor, how: str) -> None:
        dist.all_reduce(x, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group=ranks)

    return token_losses(logits, labels, ranks.rank() * logits.shape[1], combine)


def token_scores(logits: Tensor, labels: Tensor, ranks: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """parts.token_scores of logits [N, share]."""
    best, place = logits.max(-1)
    most = best.float().contiguous()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=ranks)
    first = torch.where(best.float() == most, place + ranks.rank() * logits.shape[-1], torch.iinfo(torch.int64).max)
    dist.all_reduce(first, dist.ReduceOp.MIN, group=ranks)
    return losses_of(logits, labels, ranks), first == labels
