"""Layers of a model that share one weight, recognised by the shared tensor, whatever their names.

A T5 encoder has its embedding under two names and calls one of them; a language model computes its output with the
weight of its embedding. An adapter on one name of an embedding acts on all of its names. On the other layers that have
the same weight, it acts if the settings (`ensure_weight_tying`) or the file say so. The layers of such a group get one
set of parameters: one of them is the primary one, and the adapter layers of its twins have the same tensors.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError, naming
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.targets import Targets, walk
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.mirrored import on_twin
from diffadapt.weights.resting import accelerate_hooks

_DECLARED = ("all_tied_weights_keys", "_tied_weights_keys")
"""Attributes in which models of transformers say which parameters are tied: name -> name of the same parameter."""


def tied_groups(targets: Targets) -> list[tuple[str, ...]]:
    """Return the paths of the layers that share a weight, by groups of at least two.

    Embeddings come first in a group, and among them the innermost, which is the one that is called.
    """
    owners: dict[object, list[str]] = {}
    declared = _declared(targets)
    counts = Counter(map(id, targets.weights.values()))
    for path, weight in targets.weights.items():
        if weight is None or (counts[id(weight)] == 1 and not weight.is_meta) or not targets.is_own_path(path):
            continue
        key = _key(targets.modules[path], "weight", weight)
        if weight.is_meta:
            # What is offloaded to disk, or has no values yet, is not known to be the same.
            key = declared.get(path, key)
        owners.setdefault(key, []).append(path)
    groups: list[tuple[str, ...]] = []
    for paths in owners.values():
        specs = {path: LayerSpec.of(targets.modules[path]) for path in paths} if len(paths) > 1 else {}
        known = [path for path, spec in specs.items() if spec is not None and spec.kind in ("embedding", "linear")]
        if len(known) > 1:
            known.sort(key=lambda path: (specs[path].kind != "embedding", -path.count(".")))  # type: ignore[union-attr]
            groups.append(tuple(known))
    return groups


def with_twins(targets: Targets, chosen: Iterable[str], *, tied: bool) -> dict[str, tuple[str, ...]]:
    """Return the primary layer -> its twins for every chosen layer; a layer without twins has none.

    Args:
        chosen: paths of layers, perhaps several of one group.
        tied: whether all layers with the same weight belong together, not only the names of one embedding.
    """
    group_of = {path: group for group in tied_groups(targets) for path in group}
    found: dict[str, tuple[str, ...]] = {}
    for path in chosen:
        group = group_of.get(path, (path,))
        if not tied:
            is_name = _is_embedding(targets, path)
            group = tuple(other for other in group if other == path or (is_name and _is_embedding(targets, other)))
        found.setdefault(group[0], group[1:])
    return found


def add_twins_(layers: dict[str, AdapterLayer], targets: Targets, twins: Mapping[str, Sequence[str]]) -> None:
    """Add the adapter layers of twins, which have the tensors of the primary layer.

    Args:
        layers: module path -> adapter layer; those of twins are added.
        twins: primary path -> the paths of its twins.

    Raises:
        AdapterError: a twin cannot have such an adapter.
    """
    for primary, paths in twins.items():
        layer = layers[primary]
        for path in paths:
            spec = targets.spec(path)
            with naming(path):
                adapter_type = on_twin(layer.adapter_type, layer.spec, spec, layer.tensors)
            layers[path] = AdapterLayer(
                adapter_type, spec, layer.tensors, layer.alpha, settings=layer.settings, dropout=layer.dropout
            )
            layers[path].__dict__["twin_of"] = primary


class Owners:
    """The layers of some models by the parameters that they have, so that shared ones are known."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        """
        Args:
            models: component -> model.
        """
        self._names: dict[object, dict[int, str]] = {}
        for component, model in models.items():
            for path, module in (("", model), *walk(model)):
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        owners = self._names.setdefault(_key(module, name, parameter), {})
                        owners.setdefault(id(module), f"{component}.{path}" if path else component)

    def refuse_others(
        self, where: str, host: nn.Module, changed: Iterable[str], twins: Iterable[nn.Module | None]
    ) -> None:
        """Raise `AdapterError` if a layer that an adapter does not act on has a parameter of a layer that it acts on.

        Args:
            where: the name of `host`, for the message.
            host: a layer that the adapter acts on.
            changed: the names of its parameters that are about to change.
            twins: further layers that the adapter acts on with the same tensors.
        """
        known = {id(host), *map(id, twins)}
        others: list[str] = []
        for name in changed:
            parameter = host._parameters.get(name)
            layers = {} if parameter is None else self._names.get(_key(host, name, parameter), {})
            others += [other for key, other in layers.items() if key not in known]
        if others:
            raise AdapterError(
                f"{where}: another layer has the same weight and would change too ({', '.join(others)}); keep it "
                "unmerged, or train with ensure_weight_tying=True"
            )


def refuse_other_strengths(where: str, primary: AdapterLayer, twins: Iterable[AdapterLayer]) -> None:
    """Raise `AdapterError` if twins have other strengths than the primary layer, although they share its weight."""
    for twin in twins:
        if not torch.equal(twin.gate.cpu(), primary.gate.cpu()):
            raise AdapterError(
                f"{where} and the layers that share its weight have different strengths, of which a merged weight can "
                "have only one; give them the same, or keep the adapter unmerged"
            )


def is_tied(layers: Mapping[str, AdapterLayer]) -> bool:
    """Return whether layers other than the names of one embedding share the tensors of an adapter."""
    return any(
        layer.twin_of is not None and {layer.spec.kind, layers[layer.twin_of].spec.kind} != {"embedding"}
        for layer in layers.values()
    )


def untied_paths(targets: Targets, layers: Mapping[str, AdapterLayer]) -> set[str]:
    """Return the paths of adapter layers whose weight is also that of a layer without this adapter."""
    return {
        path
        for group in tied_groups(targets)
        for path in group
        if path in layers and any(other not in layers for other in group)
    }


def _is_embedding(targets: Targets, path: str) -> bool:
    return isinstance(targets.modules[path], nn.Embedding)


def _declared(targets: Targets) -> dict[str, str]:
    """Return the path of a layer -> the weight that the model declares to be the layer's, too."""
    found: dict[str, str] = {}
    for name in _DECLARED:
        keys: Any = getattr(targets.model, name, None)
        for tied, source in keys.items() if isinstance(keys, dict) else ():  # type: ignore[misc]
            for key in (str(tied), str(source)):  # type: ignore[misc]
                found.setdefault(key.removesuffix(".weight"), str(source))  # type: ignore[misc]
    return found


def _key(module: nn.Module, name: str, parameter: Tensor) -> object:
    """Return a key that layers with the same parameter have in common."""
    if parameter.device.type != "meta":
        return id(parameter)
    # Offloading replaces parameters by placeholders, one for each layer.
    for hook in accelerate_hooks(module):
        weights: Any = getattr(hook, "weights_map", None)
        loader, key = getattr(weights, "dataset", weights), f"{getattr(weights, 'prefix', '')}{name}"
        resting = getattr(loader, "state_dict", loader)
        if isinstance(resting, Mapping) and key in resting:
            return "memory", resting[key].data_ptr()  # type: ignore[misc]
    return id(parameter)
