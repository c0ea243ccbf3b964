"""Adapters on models that two pipelines share, such as the second text encoder of SDXL's base and refiner.

Whoever loads a file into both pipelines means one adapter. The second pipeline finds a part of it on the shared model.
"""

from dataclasses import replace

import torch

from diffadapt import families
from diffadapt.loading.plan import Plan
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.adapter import Adapter


def may_be_shared(snapshot: AdapterSnapshot, name: str) -> bool:
    """Return whether adapter `name` may come from another pipeline: it is on text encoders alone, of several models."""
    loaded = snapshot.adapters.get(name)
    on_denoiser = loaded is not None and any(part.startswith(families.DENOISERS) for part in loaded.components)
    return loaded is not None and not on_denoiser and len(snapshot.models) > len(loaded.components)


def without_shared(snapshot: AdapterSnapshot, name: str, planned: Plan) -> Plan:
    """Return the plan without the components that have this very adapter already.

    Raises:
        AdapterError: the name is taken by another adapter.
    """
    if not may_be_shared(snapshot, name):
        snapshot.refuse_name(name)
        return planned
    present, new = snapshot[name].components, planned.adapters
    if not present.keys() < new.keys() or planned.tokens:
        snapshot.refuse_name(name)
    if not all(_are_equal(adapter, new[component]) for component, adapter in present.items()):
        snapshot.refuse_name(name)
    layers = {component: found for component, found in planned.layers.items() if component not in present}
    return replace(planned, layers=layers)


def _are_equal(first: Adapter, second: Adapter) -> bool:
    """Return whether two adapters have the same layers with the same content."""
    if first.layers.keys() != second.layers.keys():
        return False
    for path, layer in first.layers.items():
        left, right = layer.state, second.layers[path].state
        if (left.type, left.scale, left.settings, left.tensors.keys()) != (
            right.type,
            right.scale,
            right.settings,
            right.tensors.keys(),
        ):
            return False
        if not all(torch.equal(tensor, right.tensors[name].to(tensor)) for name, tensor in left.tensors.items()):
            return False
    return True
