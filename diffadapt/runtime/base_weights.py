"""Reading the weights of the model's own layers: where they rest between calls, and what they mean as numbers."""

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.foreign_hooks import accelerate_hooks
from diffadapt.types.layer_spec import LayerSpec


def resting_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """The tensor that keeps parameter `name` of `layer` between forwards, to be read and written in place.

    That is the parameter itself, or accelerate's copy of it while the parameter is a placeholder on the meta device.
    `None` if the layer has no such parameter.
    """
    parameter: Tensor | None = getattr(layer, name, None)
    if parameter is None or parameter.device.type != "meta":
        return parameter
    for hook in accelerate_hooks(layer):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return parameter


def decoded(layer: nn.Module, name: str) -> Tensor:
    """Parameter `name` of `layer` as numbers: float32, or float64 if the layer has that. Never the parameter itself.

    Raises:
        AdapterError: it is quantised in a way that cannot be decoded here, or its values are nowhere.
    """
    tensor = resting_tensor(layer, name)
    if tensor is None or tensor.device.type == "meta":
        raise AdapterError(f"the {name} of the {type(layer).__name__} is on the meta device; load the weights first")
    tensor = tensor.detach()
    if tensor.dtype != torch.float64:
        tensor = _dequantised(layer, name, tensor).to(torch.float32)
    return tensor


def _dequantised(layer: nn.Module, name: str, tensor: Tensor) -> Tensor:
    class_name = type(getattr(layer, name)).__name__
    if class_name in ("Params4bit", "Int8Params"):
        from diffusers.quantizers.bitsandbytes import dequantize_bnb_weight

        return dequantize_bnb_weight(getattr(layer, name), state=getattr(layer, "state", None))
    if class_name == "GGUFParameter":
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(getattr(layer, name))
    if tensor.is_quantized or (not isinstance(tensor, nn.Parameter) and type(tensor) is not Tensor):
        return tensor.dequantize()
    if not tensor.is_floating_point():
        raise AdapterError(
            f"the {name} of the {type(layer).__name__} is quantised ({tensor.dtype}) and this adapter needs its values"
        )
    return tensor


def weight_of(host: nn.Module, spec: LayerSpec) -> Tensor:
    """A layer's own weight, canonical and decoded."""
    return spec.to_stored(decoded(host, "weight"))
