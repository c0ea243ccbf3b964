"""Layers of unknown storage: packed integers (GPTQ, AWQ, EETQ), opaque tensors. The layer itself is asked.

What a linear layer makes of unit vectors, less what it makes of zeros, are the columns of its weight, whatever it
stores. That costs one call with as many rows as the layer has inputs.
"""

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights.codec import WeightCodec
from diffadapt.weights.probe import columns_of

_ROWS = 1024
"""So many unit vectors at once."""


def _recognises(layer: nn.Module, name: str) -> bool:
    return name == "weight" and type(getattr(layer, "in_features", None)) is int


def _decode(layer: nn.Module, name: str) -> Tensor:
    inputs: int = layer.in_features  # type: ignore[assignment]
    parts = [columns_of(layer, range(start, min(start + _ROWS, inputs))) for start in range(0, inputs, _ROWS)]
    return torch.cat(parts, 1)


def _parts(layer: nn.Module, name: str) -> dict[str, Tensor]:
    raise AdapterError(f"a {type(layer).__name__} stores its weight in a way that cannot be written")


BY_FORWARD = WeightCodec(
    name="the layer's own forward", recognises=_recognises, decode=_decode, parts=_parts, trusted=True
)
