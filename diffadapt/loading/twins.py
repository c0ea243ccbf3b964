"""Layers of a model that share a weight, in a file: one set of tensors for all of them, whichever the file names."""

from collections.abc import Callable, Mapping

import torch

from diffadapt.errors import AdapterError, Fault
from diffadapt.loading.duplicates import are_equal, is_placeholder
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.targets import Targets
from diffadapt.runtime.ties import add_twins_, tied_groups


def add_tied_(
    layers: Mapping[str, dict[str, AdapterLayer]],
    targets: Mapping[str, Targets],
    is_tied: Callable[[AdapterLayer], bool],
) -> list[Fault]:
    """Make adapter layers act on all layers that share the weight of theirs; see `runtime/ties.py`.

    A file may have tensors for several of these layers. Those that repeat others are dropped, as are placeholders.

    Args:
        layers: component -> module path -> adapter layer; changed in place.
        targets: the models' paths, by component.
        is_tied: whether an adapter layer also acts on layers that are no names of the same embedding.

    Returns:
        A fault for each adapter layer that contradicts another one on the same embedding. It is dropped.
    """
    faults: list[Fault] = []
    for component, found in layers.items():
        for group in tied_groups(targets[component]):
            faults += _tie_(found, targets[component], group, component, is_tied)
    return faults


def _tie_(
    layers: dict[str, AdapterLayer],
    targets: Targets,
    group: tuple[str, ...],
    component: str,
    is_tied: Callable[[AdapterLayer], bool],
) -> list[Fault]:
    """Tie the adapter layers on one group of layers."""
    present = [path for path in group if path in layers]
    if not present:
        return []
    primary = next((path for path in present if not is_placeholder(layers[path])), present[0])
    kind = targets.spec(primary).kind
    tied = is_tied(layers[primary])
    faults: list[Fault] = []
    twins: list[str] = []
    for path in group:
        is_name = kind == "embedding" and targets.spec(path).kind == "embedding"
        if path == primary or not (is_name or tied):
            continue
        if path not in layers:
            twins.append(path)
        elif is_placeholder(layers[path]) or _repeats(layers, targets, primary, path):
            del layers[path]
            twins.append(path)
        elif is_name:
            del layers[path]
            twins.append(path)
            reason = f"{primary} is the same embedding and has other tensors in this file"
            faults.append(Fault(f"{component}.{path}", reason))
    try:
        add_twins_(layers, targets, {primary: twins})
    except AdapterError as error:
        faults.append(Fault(f"{component}.{primary}", str(error)))
    return faults


def _repeats(layers: Mapping[str, AdapterLayer], targets: Targets, primary: str, path: str) -> bool:
    """Return whether the adapter layer at `path` does what that at `primary` would do there."""
    first, second = layers[primary], layers[path]
    if first.tensors.keys() == second.tensors.keys() and all(
        tensor.shape == second.tensors[name].shape and (tensor.is_meta or torch.equal(tensor, second.tensors[name]))
        for name, tensor in first.tensors.items()
    ):
        return first.spec.transposed == second.spec.transposed or first.adapter_type.is_stored
    twin = {primary: first}
    try:
        add_twins_(twin, targets, {primary: [path]})
    except AdapterError:
        return False
    return are_equal(twin[path], second)
