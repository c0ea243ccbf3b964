"""bitsandbytes 4-bit (nf4, fp4, nested or not, any `quant_storage`) and 8-bit weights.

On CPUs with AVX512-BF16, bitsandbytes 0.50 rewrites a 4-bit weight into another layout at the first forward in
inference (`packing_format_for_cpu`): the numbers in another order, the scales rounded to bfloat16, transposed and no
longer nested. `dequantize_4bit` of the packed data returns other values. bitsandbytes' own inverse puts the numbers
back, but leaves scales transposed that were not nested, and quantises nested ones anew; so only the numbers are taken
from it here.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.weights.codec import WeightCodec, class_names
from diffadapt.weights.resting import resting_tensor


def _is_4bit(layer: nn.Module, name: str) -> bool:
    weight = getattr(layer, name, None)
    return weight is not None and "Params4bit" in class_names(weight)


def _unpacked(layer: nn.Module, name: str) -> tuple[Tensor, Any]:
    """Return the packed data in the layout that it was quantised in, and the quantisation state it computes with."""
    weight: Any = getattr(layer, name)
    data, state = weight.data, weight.quant_state
    if state is None:
        raise ValueError("not quantised yet; move the model to its device first")
    if _is_repacked(state):
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

        # The function writes into the state.
        state = copy(state)
        scales, state.original_nested = state.absmax.mT.reshape(-1).float(), False
        data, state = _convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = scales
    return data, state


def _is_repacked(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _decode_4bit(layer: nn.Module, name: str) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    data, state = _unpacked(layer, name)
    return dequantize_4bit(data, state)


def _parts_4bit(layer: nn.Module, name: str) -> dict[str, Tensor]:
    weight: Any = getattr(layer, name)
    state = weight.quant_state
    parts = {name: weight.data, "absmax": state.absmax}
    if state.nested:
        parts |= {"offset": state.offset, "nested absmax": state.state2.absmax}
    return parts


def _encode_4bit(layer: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    from bitsandbytes import functional

    weight: Any = getattr(layer, name)
    state = weight.quant_state
    repacked = _is_repacked(state)
    new: Any
    data, new = functional.quantize_4bit(
        values.to(state.original_dtype if repacked else state.dtype).contiguous(),
        blocksize=state.blocksize,
        # Nested also where the layout has undone it, so that the bits are those of quantising before the repacking.
        compress_statistics=state.original_nested if repacked else state.nested,
        quant_type=state.quant_type,
        quant_storage=weight.quant_storage,
    )
    if repacked:
        data, new = functional._convert_weight_packed_for_cpu(data, new)
    contents = {name: data, "absmax": new.absmax}
    if state.nested:
        contents |= {"offset": new.offset, "nested absmax": new.state2.absmax}
    return contents


def _layout_4bit(layer: nn.Module, name: str) -> dict[str, Any]:
    """Return the attributes of the quantisation state, which change when bitsandbytes repacks a weight."""
    state: Any = getattr(layer, name).quant_state
    attributes = {**vars(state), "absmax": None, "offset": None}
    if state.nested:
        attributes["state2"] = copy(state.state2)
        attributes["state2"].absmax = None
    return attributes


def _lay_out_4bit(layer: nn.Module, name: str, layout: dict[str, Any], contents: Mapping[str, Tensor]) -> None:
    weight: Any = getattr(layer, name)
    state = weight.quant_state
    parts = _parts_4bit(layer, name)
    if _is_repacked(state) == layout.get("packing_format_for_cpu", False) and all(
        parts[part].shape == content.shape and parts[part].dtype == content.dtype for part, content in contents.items()
    ):
        return
    weight.data = contents[name].clone()
    vars(state).clear()
    vars(state).update(layout)
    state.absmax = contents["absmax"].clone()
    if state.nested:
        state.offset, state.state2 = contents["offset"].clone(), copy(layout["state2"])
        state.state2.absmax = contents["nested absmax"].clone()


def _is_8bit(layer: nn.Module, name: str) -> bool:
    weight = getattr(layer, name, None)
    return weight is not None and "Int8Params" in class_names(weight)


def _parts_8bit(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the integers and the scale of every row, which move from the weight to the layer's state at a forward."""
    weight: Any = getattr(layer, name)
    state: Any = getattr(layer, "state", None)
    data = resting_tensor(layer, name)
    scale = next((s for s in (getattr(weight, "SCB", None), getattr(state, "SCB", None)) if s is not None), None)
    if scale is None or scale.device.type == "meta":
        scale = _offloaded_scale(layer, name)
    if data is None or data.dtype != torch.int8 or data.device.type == "meta" or scale is None:
        raise ValueError("not quantised yet, or out of reach; move the model to its device first")
    return {name: data.detach(), "SCB": scale}


def _offloaded_scale(layer: nn.Module, name: str) -> Tensor | None:
    """Return the scales that accelerate keeps next to an offloaded weight."""
    from diffadapt.weights.resting import accelerate_hooks

    for hook in accelerate_hooks(layer):
        weights = getattr(hook, "weights_map", None)
        for key in ("SCB", f"{name}.SCB", f"{name}_SCB"):
            if weights is not None and key in weights:
                return weights[key]
    return None


def _decode_8bit(layer: nn.Module, name: str) -> Tensor:
    parts = _parts_8bit(layer, name)
    scale = parts["SCB"].to(parts[name].device, torch.float32)
    return parts[name].float() * (scale / 127).view(-1, 1)


def _encode_8bit(layer: nn.Module, name: str, values: Tensor) -> dict[str, Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    data, scale, _ = int8_vectorwise_quant(values.to(torch.float16))
    return {name: data, "SCB": scale.view(-1)}


FOUR_BIT = WeightCodec(
    name="bitsandbytes 4-bit",
    recognises=_is_4bit,
    decode=_decode_4bit,
    parts=_parts_4bit,
    encode=_encode_4bit,
    layout=_layout_4bit,
    lay_out=_lay_out_4bit,
    trusted=True,
    remedy=(
        "bitsandbytes has rewritten their weights for inference on this CPU (a call in eval() without gradients): load "
        "the model again, and call train() before its first call"
    ),
)
EIGHT_BIT = WeightCodec(
    name="bitsandbytes 8-bit",
    recognises=_is_8bit,
    decode=_decode_8bit,
    parts=_parts_8bit,
    encode=_encode_8bit,
    trusted=True,
)
