"""Tensor subclasses that decode themselves: torchao's, optimum-quanto's and torch's own quantised ones."""

from typing import Any

from torch import Tensor, nn

from diffadapt.weights.codec import WeightCodec, inner_tensors
from diffadapt.weights.resting import resting_tensor


def _tensor(layer: nn.Module, name: str) -> Any:
    tensor: Any = resting_tensor(layer, name)
    # A parameter made of a subclass may hide it.
    return tensor.data if type(tensor) is nn.Parameter else tensor


def _recognises(layer: nn.Module, name: str) -> bool:
    tensor = _tensor(layer, name)
    return tensor is not None and (type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized)


def _decode(layer: nn.Module, name: str) -> Tensor:
    return _tensor(layer, name).detach().dequantize()


def _parts(layer: nn.Module, name: str) -> dict[str, Tensor]:
    return inner_tensors(_tensor(layer, name))


def _encode(layer: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    tensor = _tensor(layer, name)
    module = type(tensor).__module__.partition(".")[0]
    quantise = {"torchao": _torchao, "optimum": _quanto}.get(module)
    if quantise is None:
        raise NotImplementedError(f"{type(tensor).__name__} has no quantiser that is known here")
    return inner_tensors(quantise(layer, tensor, values.to(tensor.dtype)))


def _torchao(layer: nn.Module, tensor: Any, values: Tensor) -> Tensor:
    """Quantise with the block size and the dtype that the tensor has."""
    own = type(tensor)
    if own.__name__ == "NVFP4Tensor":
        return _nvfp4(tensor, values)
    blocks = list(tensor.block_size)
    if own.__name__ == "IntxUnpackedToInt8Tensor":
        return own.from_hp(values, tuple(blocks), tensor.target_dtype)
    from torchao.quantization.granularity import PerBlock, PerGroup, PerRow, PerTensor

    if blocks == list(values.shape):
        granularity: Any = PerTensor()
    elif blocks[:-1] == [1] * (len(blocks) - 1):
        granularity = PerRow() if blocks[-1] == values.shape[-1] else PerGroup(blocks[-1])
    else:
        granularity = PerBlock(tuple(blocks))
    if own.__name__ == "Int8Tensor":
        return own.from_hp(values, granularity)
    if own.__name__ == "Float8Tensor":
        return own.from_hp(values, tensor.qdata.dtype, granularity)
    raise NotImplementedError(f"torchao's {own.__name__} has no quantiser that is known here")


def _nvfp4(tensor: Any, values: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import per_tensor_amax_to_scale

    return type(tensor).to_nvfp4(
        values,
        tensor.block_size,
        None if tensor.per_tensor_scale is None else per_tensor_amax_to_scale(values.abs().amax()),
        tensor.act_per_tensor_scale,
        tensor.is_swizzled_scales,
        tensor.use_triton_kernel,
        tensor.act_quant_kwargs,
    )


def _quanto(layer: Any, tensor: Any, values: Tensor) -> Tensor:
    """Let the layer quantise the values as it did its own weight."""
    from optimum.quanto import quantize_weight
    from optimum.quanto.tensor import AbsmaxOptimizer, MaxOptimizer

    qtype, axis = tensor.qtype, tensor.axis
    group = getattr(tensor, "_group_size", None)
    if qtype.bits == 8:
        scale = AbsmaxOptimizer()(values, qtype, axis)
        return quantize_weight(values, qtype=qtype, axis=axis, scale=scale, optimized=False)
    scale, shift = MaxOptimizer()(values, qtype, axis, group)
    return quantize_weight(values, qtype=qtype, axis=axis, scale=scale, shift=shift, group_size=group, optimized=False)


TENSOR_SUBCLASS = WeightCodec(
    name="a tensor subclass", recognises=_recognises, decode=_decode, parts=_parts, encode=_encode
)
