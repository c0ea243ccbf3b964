"""nvfp4 layers of Black Forest Labs' checkpoints in diffusers: two E2M1 numbers in a byte, with scales for 16 each."""

from typing import Any

from torch import Tensor, nn

from diffadapt.weights.codec import WeightCodec, class_names


def _recognises(layer: nn.Module, name: str) -> bool:
    return name == "weight" and "BFLNVFP4Linear" in class_names(layer)


def _decode(layer: Any, name: str) -> Tensor:
    from diffusers.quantizers.bfl.utils import dequantize_nvfp4

    return dequantize_nvfp4(layer.weight.detach(), layer.weight_scale, layer.weight_scale_2)


def _parts(layer: Any, name: str) -> dict[str, Tensor]:
    return {
        name: layer.weight.detach(),
        "weight_scale": layer.weight_scale.detach(),
        "weight_scale_2": layer.weight_scale_2.detach(),
    }


def _encode(layer: Any, name: str, values: Tensor) -> dict[str, Tensor]:
    from diffusers.quantizers.bfl.utils import quantize_nvfp4

    packed, scale, scale_2 = quantize_nvfp4(values)
    return {name: packed, "weight_scale": scale, "weight_scale_2": scale_2}


NVFP4 = WeightCodec(
    name="BFL nvfp4", recognises=_recognises, decode=_decode, parts=_parts, encode=_encode, trusted=True
)
