"""GGUF weights of diffusers, of every quantisation type that diffusers decodes."""

from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.weights import gguf_k_quants
from diffadapt.weights.codec import WeightCodec, class_names


def _recognises(layer: nn.Module, name: str) -> bool:
    weight = getattr(layer, name, None)
    return weight is not None and "GGUFParameter" in class_names(weight)


def _decode(layer: nn.Module, name: str) -> Tensor:
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(getattr(layer, name)).as_subclass(Tensor)


def _parts(layer: nn.Module, name: str) -> dict[str, Tensor]:
    return {name: getattr(layer, name).data.as_subclass(Tensor)}


def _encode(layer: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    from gguf.quants import quantize

    weight: Any = getattr(layer, name)
    if weight.quant_type.name in gguf_k_quants.NAMES:
        packed = gguf_k_quants.quantise(values, weight.quant_type.name)
        return {name: packed.view(weight.dtype).view(weight.shape)}
    try:
        packed = quantize(values.detach().float().cpu().numpy(), weight.quant_type)
    except NotImplementedError as error:
        raise AdapterError(f"the gguf package cannot quantise to {weight.quant_type.name}") from error
    return {name: torch.from_numpy(packed).view(weight.dtype).view(weight.shape)}


# Not trusted: diffusers unpacks such weights in linear layers only; other layers compute with the bytes.
GGUF = WeightCodec(name="GGUF", recognises=_recognises, decode=_decode, parts=_parts, encode=_encode)
