"""Evaluation of checkpoints (verb `evaluate`): a task is a module <name>_task.py; all score labels by scoring.py."""

from titans_train.evaluation.command import main

__all__ = ["main"]
