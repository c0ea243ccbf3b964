"""The weight of a model's own layer, as formulas use it."""

import torch
from torch import Tensor, nn

from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights import codec_of, decoded
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.resting import resting_tensor


def weight_of(host: nn.Module, spec: LayerSpec) -> Tensor:
    """Return the weight of `host`, canonical and decoded: float32, or float64 if the layer has that.

    In a compiled graph, only plain weights are decoded without a graph break.
    """
    if not torch.compiler.is_compiling():
        return spec.to_stored(decoded(host, "weight"))
    weight = host._parameters.get("weight")
    if weight is not None and _is_plain(host):
        return spec.to_stored(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)))
    return spec.to_stored(_decoded_outside(host))  # type: ignore[arg-type]


@torch.compiler.assume_constant_result
def _is_plain(host: nn.Module) -> bool:
    """Return whether the weight of `host` is stored as the numbers it stands for. This runs while a graph is traced."""
    is_there = host._parameters["weight"] is resting_tensor(host, "weight")
    return is_there and codec_of(host, "weight") is PLAIN


@torch.compiler.disable
def _decoded_outside(host: nn.Module) -> Tensor:
    """Return the decoded weight of `host`, computed outside the graph."""
    return decoded(host, "weight")
