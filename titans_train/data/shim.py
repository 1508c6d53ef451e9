"""Import mosaicml-streaming where torchvision was built for CUDA and torch was not.

streaming imports torchvision for image classes we never use. The torchvision wheel then cannot load its operators,
and fails on "operator torchvision::nms does not exist". Declaring the two schemas is enough for its Python parts.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # a torch Library's schemas vanish with the object


def import_streaming(module: str) -> ModuleType:
    """The named module of the streaming package, as importlib gives it."""
    if "streaming" not in sys.modules:
        _make_torchvision_importable()
    return importlib.import_module(module)


def _make_torchvision_importable() -> None:
    import torch

    try:
        importlib.import_module("torchvision")
        return
    except ImportError:
        return  # streaming says itself what it misses
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    library_class: Any = torch.library.Library
    library = library_class("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)
