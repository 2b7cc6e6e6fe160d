"""Which layers of a backbone can be quantized."""

from __future__ import annotations

from torch import nn

from qdiff.nn.conv import is_plain

ASKED_FOR_DTYPE = {"WanTimeTextImageEmbedding": ("time_embedder",)}
"""Modules of which diffusers asks the dtype of their first parameter, by the class around them: they have to keep parameters."""


def quantizable_layers(backbone: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers that can be quantized, by name, in module order: linear layers, and convolutions that are plain
    (:func:`qdiff.nn.conv.is_plain`). What subclasses ``nn.Linear`` has a forward of its own. Left out are those of
    :data:`ASKED_FOR_DTYPE`.
    """
    left_out = tuple(
        f"{name}.{child}."
        for name, module in backbone.named_modules()
        for child in ASKED_FOR_DTYPE.get(type(module).__name__, ())
    )
    return {
        name: module
        for name, module in backbone.named_modules()
        if (type(module) is nn.Linear or is_plain(module)) and not name.startswith(left_out)
    }
