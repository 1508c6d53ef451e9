"""A model on a mesh with stored parameters, without an optimiser: for evaluation."""

from __future__ import annotations

import torch

from titans_train.models import LanguageModel
from titans_train.models.stored import Stored, check
from titans_train.parallel.launch import device
from titans_train.parallel.mesh import Mesh
from titans_train.parallel.shards import ShardSettings
from titans_train.parallel.split import split_of
from titans_train.parallel.tensor import make_parts
from titans_train.shape import ModelShape


def load_model(
    shape: ModelShape, stored: Stored, mesh: Mesh, sequence_parallel: bool, shards: ShardSettings | None
) -> LanguageModel:
    """This rank's share, fp32, on its device, in eval mode. UserError where other parameters are stored."""
    check(shape, stored)
    model = LanguageModel(shape, make_parts(mesh, sequence_parallel, shards))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole, split = stored.tensor("parameters", name), split_of(parameter)
            parameter.copy_(whole if split is None else split.share(whole, mesh.tensor_rank))
    return model.to(device()).eval()
