"""What is merged into the layers of a model: for each, the adapter layers and the weight and bias that they change."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.merging.stored import Stored
from diffadapt.merging.weight_update import Layers
from diffadapt.runtime import compose
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.ties import Owners, refuse_other_strengths

ByName = Mapping[str, Adapter]
"""The adapters merged into one model, always in the order of attachment, because the order decides the last bits."""


@dataclass(frozen=True)
class MergedLayer:
    """A layer of the model and the adapter layers to merge into it.

    Attributes:
        where: component and module path, for messages.
        name: name of the weight in its model.
        weight: the weight, or `None` if the adapters change the bias alone.
        bias: the bias, or `None` if the adapters do not change it.
    """

    host: nn.Module
    where: str
    name: str
    layers: Layers
    weight: Stored | None
    bias: Tensor | None


def merged_layers(
    component: str, adapters: ByName, hosts: Mapping[str, nn.Module], owners: Owners
) -> dict[str, MergedLayer]:
    """Return what `adapters` merge into every layer, by module path. A weight that several layers share occurs once.

    Args:
        owners: the layers of all models by their parameters.

    Raises:
        AdapterError: a weight cannot be written, or a layer that an adapter does not act on shares it.
    """
    found: dict[str, MergedLayer] = {}
    twins: dict[tuple[str, str], list[str]] = {}
    for adapter_name, adapter in adapters.items():
        for path, layer in adapter.layers.items():
            if layer.twin_of is not None:
                twins.setdefault((adapter_name, layer.twin_of), []).append(path)
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers):
        host, where = hosts[path], f"{component}.{path}"
        layers = tuple(adapter.layers[path] for adapter in adapters.values() if path in adapter.layers)
        if all(layer.twin_of is not None for layer in layers):
            continue
        parameter = layers[0].parameter
        weight = None if all(map(_is_bias_alone, layers)) else Stored.of(host, where, parameter)
        bias = None
        if compose.changes_bias(((layer, layer.tensors) for layer in layers), getattr(host, "bias", None) is not None):
            stored = Stored.of(host, where, "bias")
            if stored.codec is not None:
                raise AdapterError(f"{where}: its bias is quantised ({stored.codec.name}); keep it unmerged")
            bias = stored.tensor
        changed = [name for name, tensor in ((parameter, weight), ("bias", bias)) if tensor is not None]
        for adapter_name, adapter in adapters.items():
            if path in adapter.layers:
                own = twins.get((adapter_name, path), ())
                refuse_other_strengths(where, adapter.layers[path], [adapter.layers[twin] for twin in own])
                owners.refuse_others(where, host, changed, map(hosts.get, own))
        name = f"{path}.weight" if parameter == "weight" else path
        found[path] = MergedLayer(host, where, name, layers, weight, bias)
    return found


def _is_bias_alone(layer: AdapterLayer) -> bool:
    """Return whether a change of the bias is all that an adapter layer has."""
    return layer.is_additive and len(layer.tensors) == 1 and layer.adapter_type.delta_bias(layer.tensors) is not None
