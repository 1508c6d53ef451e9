"""Generation with a carried memory state: constant memory per token, states that outlive the process."""

from titans_train.inference.command import main
from titans_train.inference.sampling import Sampler, generate, sample_text

__all__ = ["Sampler", "generate", "main", "sample_text"]
