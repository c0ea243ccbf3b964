"""What to do if a format cannot express an adapter: the formats that can, found by writing the adapter in each."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from diffadapt.errors import AdapterError
from diffadapt.formats.document import AdapterState, Document
from diffadapt.formats.format import Format
from diffadapt.types.layer_state import LayerState

_ORDER = ("kohya", "comfy", "onetrainer", "diffusers", "peft")
"""The order in which formats are named; all others come last."""


def dump_or_advise(chosen: Format, others: Iterable[Format], state: AdapterState) -> Mapping[str, Document]:
    """Return what `chosen` writes for an adapter.

    Raises:
        AdapterError: the format cannot express the adapter. The message says which of the `others` can, and whether a
            plain LoRA could be written.
    """
    assert chosen.dump is not None
    try:
        return chosen.dump(state)
    except AdapterError as error:
        able = [other.name for other in others if other is not chosen and _can_write(other, state)]
        able.sort(key=lambda name: (*_ORDER, name).index(name))
        lora = _as_loras(state)
        advice = [f"save with format={' or '.join(map(repr, able))}"] if able else []
        if lora is not None and _can_write(chosen, lora):
            advice.append("make it a LoRA with to_lora()")
        text = ", or ".join(advice) or "no format has a place for all of it; save its components one by one"
        raise AdapterError(f"{error}; {text}") from error


def _can_write(format: Format, state: AdapterState) -> bool:
    assert format.dump is not None
    try:
        format.dump(state)
    except AdapterError:
        return False
    return True


def _as_loras(state: AdapterState) -> AdapterState | None:
    """Return the adapter with an empty LoRA in the place of every layer, or `None` if a layer cannot have one.

    The number of outputs is right where it matters: in layers that are fused in the original layout.
    """
    layers: dict[str, dict[str, LayerState]] = {}
    for component, found in state.layers.items():
        sizes = {part.path: size for parts in state.layouts.get(component, {}).values() for part, size in parts}
        layers[component] = {}
        for path, layer in found.items():
            if not _can_be_lora(layer):
                return None
            down = torch.zeros(1, 1, *layer.kernel)
            tensors = {"lora_down": down, "lora_up": torch.zeros(sizes.get(path, 1), 1)}
            layers[component][path] = LayerState("lora", tensors, None, 1, layer.kernel, layer.is_embedding)
    return replace(state, layers=layers)


def _can_be_lora(layer: LayerState) -> bool:
    """Return whether the layer has a weight that is a matrix, so that its change can be a LoRA."""
    if layer.type != "full":
        return layer.type != "lora-parameter"
    weight = layer.tensors.get("diff", layer.tensors.get("set_weight"))
    # A table of three dimensions is a bare parameter.
    return weight is not None and weight.ndim == 2 + layer.kernel_dims
