"""Layers that a file contains twice: by themselves, and as part of a fused layer.

Most such files are mistakes. diffusers 0.42.1 `loaders/lora_conversion_utils.py` and ComfyUI `comfy/lora_convert.py`
accept two kinds: Z-Image files, where a fused projection repeats what its parts contain, and Krea 2 files, where the
parts are placeholders without effect and the fused projection is meant.
"""

from collections.abc import Mapping

from torch import Tensor

from diffadapt.runtime.adapter_layer import AdapterLayer

_TOLERANCE = 0.02
"""Relative difference of equal changes: converting between programs' names rescales factors in half precision."""


def without_duplicates(
    present: Mapping[str, AdapterLayer], new: Mapping[str, AdapterLayer]
) -> dict[str, AdapterLayer] | None:
    """Return the `new` adapter layers to use in addition to those that are `present`, or in place of placeholders.

    Left out are new placeholders for layers that are present, and repetitions of them. All are by module path.

    Returns:
        `None` if `new` contradicts a layer that is present, or repeats some of its own layers but not all.
    """
    chosen = dict(new)
    repeated = 0
    for path in present.keys() & new.keys():
        if is_placeholder(new[path]):
            del chosen[path]
        elif not is_placeholder(present[path]):
            if not are_equal(present[path], new[path]):
                return None
            repeated += 1
            del chosen[path]
    return chosen if repeated in (0, len(new)) else None


def is_placeholder(layer: AdapterLayer) -> bool:
    """Return whether the adapter layer is a plain LoRA with a factor of zeros, as it is before training."""
    factors = [layer.tensors.get(name) for name in ("lora_down", "lora_up")]
    zero = any(factor is not None and not factor.is_meta and not factor.any() for factor in factors)
    return layer.adapter_type.name == "lora" and "lora_bias" not in layer.tensors and zero


def are_equal(first: AdapterLayer, second: AdapterLayer) -> bool:
    """Return whether two adapter layers add the same to the weight and nothing to the bias.

    If only headers were read, the values count as equal.
    """
    changes: list[tuple[Tensor, Tensor | None]] = []
    for layer in (first, second):
        if not layer.is_additive or layer.adapter_type.is_prepared:
            return False
        tensors = {name: tensor.detach().float() for name, tensor in layer.tensors.items()}
        bias = layer.adapter_type.delta_bias(tensors)
        changes.append((layer.adapter_type.delta_weight(tensors, layer.spec) * layer.scale, bias))
    (weight, bias), (other, other_bias) = changes
    if bias is not None or other_bias is not None:
        return False
    return weight.is_meta or bool((weight - other).norm() <= _TOLERANCE * weight.norm())
