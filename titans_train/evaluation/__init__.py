"""Evaluation of checkpoints: loss, perplexity and bits per byte on prepared data; accuracy on synthetic recall."""

from titans_train.evaluation.command import main
from titans_train.evaluation.perplexity import evaluate

__all__ = ["evaluate", "main"]
