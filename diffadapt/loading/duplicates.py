"""Layers that a file has twice: by themselves, and in one with others.

Most such files are mistakes. diffusers 0.42.1 `loaders/lora_conversion_utils.py` and ComfyUI `comfy/lora_convert.py`
know two kinds that are not: of Z-Image, where a fused projection says again what its parts say, and of Krea 2, where
the parts are placeholders that do nothing beside the fused one.
"""

from collections.abc import Mapping

from torch import Tensor

from diffadapt.runtime.adapter_layer import AdapterLayer

_ROUNDING = 0.02
"""Of half-precision factors that were scaled on the way from one program's names to the other's."""


def winners(held: Mapping[str, AdapterLayer], new: Mapping[str, AdapterLayer]) -> dict[str, AdapterLayer] | None:
    """Which of the `new` adapter layers to use beside or instead of those that are `held`, by path of the model.

    `None` if they contradict each other, or say the same of some of the layers only.
    """
    chosen = dict(new)
    alike = 0
    for path in held.keys() & new.keys():
        if is_idle(new[path]):
            del chosen[path]
        elif not is_idle(held[path]):
            if not _says_the_same(held[path], new[path]):
                return None
            alike += 1
            del chosen[path]
    return chosen if alike in (0, len(new)) else None


def is_idle(layer: AdapterLayer) -> bool:
    """Whether it is a plain LoRA with a factor of zeros, as a new one has."""
    factors = [layer.tensors.get(name) for name in ("lora_down", "lora_up")]
    zero = any(factor is not None and not factor.is_meta and not factor.any() for factor in factors)
    return layer.adapter_type.name == "lora" and "lora_bias" not in layer.tensors and zero


def _says_the_same(first: AdapterLayer, second: AdapterLayer) -> bool:
    """Whether two additive adapter layers add the same to weight and bias, so far as headers alone tell."""
    changes: list[tuple[Tensor, Tensor | None]] = []
    for layer in (first, second):
        if not layer.is_additive or layer.adapter_type.is_prepared:
            return False
        wide = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
        bias = layer.adapter_type.delta_bias(wide)
        changes.append((layer.adapter_type.delta_weight(wide, layer.spec) * layer.scale, bias))
    (weight, bias), (other, other_bias) = changes
    if bias is not None or other_bias is not None:
        return False
    return weight.is_meta or bool((weight - other).norm() <= _ROUNDING * weight.norm())
