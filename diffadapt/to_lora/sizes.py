"""How large the change of each layer is that an adapter makes."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime import compose
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.to_lora.change import WeightedLayer
from diffadapt.to_lora.factors import Factors


class Sizes(NamedTuple):
    """The sizes of the changes that an adapter makes at strength 1.

    Attributes:
        by_layer: "component.path" -> size of the change of the layer's weight or, if it has only a bias, of that.
        relative: whether sizes are Frobenius norms divided by the norm of the layer's own weight; otherwise they are
            root mean squares of the elements.
    """

    by_layer: dict[str, float]
    relative: bool


@torch.no_grad()
def change_sizes(adapters: Mapping[str, Adapter]) -> Sizes:
    """Return the sizes of the changes that an adapter makes, relative to the weights where all of them can be read.

    Layers whose change depends on a weight that cannot be read are left out.

    Args:
        adapters: component -> the adapter of its model, attached or not.
    """
    norms: dict[str, float] = {}
    elements: dict[str, int] = {}
    weights: dict[str, float] = {}
    for component, adapter in adapters.items():
        for path, layer in adapter.layers.items():
            where = f"{component}.{path}"
            try:
                norms[where], elements[where] = _norm(layer)
            except AdapterError:
                continue
            own = _own_weight(layer)
            if own is not None:
                weights[where] = float(torch.linalg.vector_norm(own.float()))
    if norms and norms.keys() == weights.keys() and all(weights.values()):
        return Sizes({where: norm / weights[where] for where, norm in norms.items()}, True)
    return Sizes({where: norm / elements[where] ** 0.5 for where, norm in norms.items()}, False)


def _norm(layer: AdapterLayer) -> tuple[float, int]:
    """Return the Frobenius norm of a layer's change at strength 1, and the number of elements that change."""
    spec = layer.spec
    weighted = WeightedLayer(layer, 1.0, {})
    base = torch.zeros((), dtype=torch.float32, device=next(layer.parameters()).device).expand(spec.weight_shape)
    if weighted.reads_base:
        own = _own_weight(layer)
        if own is None:
            raise AdapterError("its change depends on a weight that cannot be read")
        base = spec.to_stored(own).to(base)
    prepared = weighted.prepare_for_weight(base)
    factors = layer.adapter_type.as_low_rank(prepared.tensors, spec) if layer.is_additive and spec.groups == 1 else None
    if factors is not None:
        down, up = (factor.flatten(1).float() for factor in factors)
        norm = Factors(up.unsqueeze(0), down.unsqueeze(0)).norm() * abs(float(prepared.gate))
    else:
        norm = float(torch.linalg.vector_norm(compose.weight([prepared], base) - base))
    bias = layer.adapter_type.delta_bias(prepared.tensors)
    if norm == 0 and bias is not None:
        return float(torch.linalg.vector_norm(bias.float())) * abs(float(prepared.gate)), bias.numel()
    return norm, base.numel()


def _own_weight(layer: AdapterLayer) -> Tensor | None:
    """Return the weight of a layer's host as it is stored, or `None` if it cannot be read."""
    host = layer.__dict__.get("host") or layer._modules.get("host")
    if host is None:
        return None
    try:
        return WeightedLayer(layer, 1.0, {}).base("weight")
    except AdapterError:
        return None
