"""AdamW's parameter groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from titans_train.config import RunConfig


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for the matrices of linear maps and the embedding (which is the head as well, where tied).

    Not for norms, biases, convolutions (vectors, or taps near the identity) and the constants of others' rules, nor for
    what a document starts from (initial memory weights, persistent tokens): decaying those would pull the start of
    every document to zero.
    """
    kept_whole = ("_conv.", "initial.", "persistent.", "constants.", ".norm.value_", "norm.scale", "gating.", "_bias.")
    return parameter.ndim >= 2 and not any(part in name for part in kept_whole)


def make_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with two groups, with and without weight decay, parameters in the model's order."""
    o = config.optimizer
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": o.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    # fused: moves parameters in place; the other forms make temporary copies of all of them
    return torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.eps, fused=True)


def learning_rate(step: int, config: RunConfig) -> float:
    """Of step 0, 1, ...: linear warm-up to the peak, then a cosine down to final_fraction at the last step."""
    o, steps = config.optimizer, config.training.steps
    if step < o.warmup_steps:
        return o.learning_rate * (step + 1) / o.warmup_steps
    progress = min(1.0, (step - o.warmup_steps) / max(1, steps - 1 - o.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return o.learning_rate * (o.final_fraction + (1 - o.final_fraction) * cosine)
