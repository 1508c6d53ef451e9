"""Layers, attention, the five blocks and the language model, in plain PyTorch.

No rank, group or collective: what differs between one process and many comes in through `parts` and `neighbours`.
"""

from titans_train.models.language_model import LanguageModel, ModelOutput, recording
from titans_train.models.parts import Parts, SingleDevice

__all__ = ["LanguageModel", "ModelOutput", "Parts", "SingleDevice", "recording"]
