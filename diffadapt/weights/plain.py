"""Ordinary floating-point weights, also the float8 ones of layerwise casting: the values are what is stored."""

import torch
from torch import Tensor, nn

from diffadapt.weights.codec import WeightCodec
from diffadapt.weights.resting import resting_tensor
from diffadapt.weights.scaled import scale_beside

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
)


def _recognises(layer: nn.Module, name: str) -> bool:
    tensor = resting_tensor(layer, name)
    return (
        tensor is not None
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in _DTYPES
        and (name != "weight" or scale_beside(layer) is None)
    )


def _decode(layer: nn.Module, name: str) -> Tensor:
    tensor = resting_tensor(layer, name)
    assert tensor is not None
    return tensor.detach()


PLAIN = WeightCodec(
    name="floating point",
    recognises=_recognises,
    decode=_decode,
    parts=lambda layer, name: {name: _decode(layer, name)},
    encode=lambda layer, name, values: {name: values.to(_decode(layer, name).dtype)},
)
