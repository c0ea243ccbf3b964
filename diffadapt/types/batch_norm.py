"""A new batch norm: its scale, bias and running statistics, `y = (x - mean) / sqrt(var + eps) * weight + bias`.

PEFT stores it under `modules_to_save`, running statistics included. Strength m interpolates between the outputs of the
two norms, each with its own running statistics, as they act in evaluation mode.

| tensor | shape | |
|---|---|---|
| `bn_weight` | (channels) | the scale; left out if the norm has none |
| `bn_mean`, `bn_var` | (channels) | the running statistics |
| `diff_b` | (channels) | the change of the bias; left out if the norm has none |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.config import AdapterConfig
from diffadapt.types.full import apply_map
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, scaled, shape_of

_TENSORS = ("bn_weight", "bn_mean", "bn_var", "diff_b")


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig(AdapterConfig):
    """Settings of a new batch norm, of which there are none: files have them, and nothing trains them."""


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the statistics are there and that every tensor has one value for each channel."""
    missing = [name for name in ("bn_mean", "bn_var") if name not in tensors]
    if missing:
        raise AdapterError(f"{' and '.join(missing)} is missing: a batch norm needs its running statistics")
    for name, tensor in tensors.items():
        if shape_of(tensor) != (spec.out_features,):
            raise AdapterError(f"{name} has shape {shape_of(tensor)}, expected ({spec.out_features},)")
    return dict(tensors)


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a batch norm with as many channels as the tensors have."""
    size = next(iter(tensors.values())).numel()
    return LayerSpec("batch_norm", size, size, norm_groups=1)


def init(
    spec: LayerSpec, config: BatchNormConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Raise `AdapterError`: there is nothing to train."""
    raise AdapterError("a batch norm is loaded from a file; an adapter that trains it does not exist")


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "output" and "add": replacing the norm takes its output to zero."""
    return ("output", "add")


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Raise `AdapterError`, since the running statistics are no part of the weight."""
    raise AdapterError("a batch norm with its own running statistics cannot be merged; keep the adapter unmerged")


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated output of the new norm, with the change of the bias in the place of the bias."""
    scale = torch.rsqrt(tensors["bn_var"] + spec.eps)
    if "bn_weight" in tensors:
        scale = scale * tensors["bn_weight"]
    shift = -tensors["bn_mean"] * scale
    if "diff_b" in tensors:
        shift = shift + tensors["diff_b"]
    scale, shift = (spec.along_channels(values, input.ndim).to(input.dtype) for values in (scale, shift))
    output = scaled(input * scale + shift, gate)
    return output if onto is None else add(output, onto)


BATCH_NORM = AdapterType(
    name="batch-norm",
    tensors=_TENSORS,
    identified_by=frozenset({"bn_mean", "bn_var"}),
    config=BatchNormConfig,
    fit=fit,
    init=init,
    geometry=geometry,
    stages=stages,
    apply_map=apply_map,
    delta_weight=delta_weight,
    delta_bias=lambda tensors: None,
    delta_output=delta_output,
    layers=frozenset({"batch_norm"}),
)
