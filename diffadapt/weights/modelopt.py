"""nvidia-modelopt layers: a float weight that the layer's quantiser rounds in every forward, or a compressed one."""

from typing import Any

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights.codec import WeightCodec


def _recognises(layer: nn.Module, name: str) -> bool:
    return name == "weight" and isinstance(layer._modules.get("weight_quantizer"), nn.Module)


def _decode(layer: Any, name: str) -> Tensor:
    return layer.weight_quantizer(layer.weight)


def _parts(layer: Any, name: str) -> dict[str, Tensor]:
    raise AdapterError("nvidia-modelopt calibrates its quantisers on data, and they would not suit another weight")


MODELOPT = WeightCodec(name="nvidia-modelopt", recognises=_recognises, decode=_decode, parts=_parts, trusted=True)
