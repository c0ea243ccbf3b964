"""Weights that are offloaded to disk: adapters stay in memory, and no adapter can be merged into such weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from diffadapt.weights.resting import disk_groups, note_disk_group, rests_on_disk


def keep_in_memory_(model: nn.Module, owners: Iterable[nn.Module]) -> None:
    """Take adapters out of diffusers' group offloading to disk, if it was installed after they were loaded.

    It reads the tensors of a module from disk when the module is called, which adapter layers are not, and leaves
    uninitialised memory in their place between calls.

    Args:
        model: the model.
        owners: the modules whose parameters stay in memory. Either all of the parameters of one are offloaded or none.
    """
    on_root = "_diffusers_hook" in model.__dict__
    for owner in owners:
        # Every call of a model comes here, so most cases are left at once.
        child = next(iter(owner._modules.values()), None)
        if child is None or not (on_root or "_diffusers_hook" in child.__dict__):
            continue
        first = next(owner.parameters(), None)
        if first is None:
            continue
        leaf = next(module for module in owner.modules() if module._parameters)
        if any(first in group.tensor_to_key for module in (model, leaf) for group in disk_groups(module)):
            own = {id(parameter) for parameter in owner.parameters()}
            for module in (model, *owner.modules()):
                for group in disk_groups(module):
                    _take_out_(group, own, owner)


def note_groups_(model: nn.Module, hosts: Mapping[str, nn.Module]) -> None:
    """Find the blocks that are offloaded to disk as a whole, so that the weights of `hosts` can be read between calls.

    Args:
        model: the model.
        hosts: module path -> layer.
    """
    if next(disk_groups(model), None) is None:
        return
    for path, host in hosts.items():
        module: nn.Module | None = model
        for name in path.split("."):
            for group in disk_groups(module) if module is not None else ():
                if any(own in group.tensor_to_key for own in host._parameters.values() if own is not None):
                    note_disk_group(host, group)
            module = None if module is None else module._modules.get(name)


def why_not_writable(model: nn.Module, hosts: Mapping[str, nn.Module]) -> str | None:
    """Return why the weights of some layers cannot be written, or `None` if nothing speaks against it.

    Args:
        model: the model.
        hosts: module path -> layer.
    """
    reason = (
        "which are read again for every call, so adapters can be neither merged into them nor unmerged; remove the "
        "offloading first, or keep adapters unmerged"
    )
    if any(True for module in model.modules() for _ in disk_groups(module)):
        return f"group offloading keeps the weights of this model on disk, {reason}"
    for path, host in hosts.items():
        if any(rests_on_disk(host, name) for name in host._parameters):
            return f"{path}: accelerate keeps its weights on disk, {reason}"
    return None


def _take_out_(group: Any, own: set[int], owner: nn.Module) -> None:
    tensors = [tensor for tensor in group.tensor_to_key if id(tensor) in own]
    others = {tensor: tensor.data for tensor in group.tensor_to_key if id(tensor) not in own}
    if not tensors:
        return
    group.onload_()
    for tensor, data in others.items():
        tensor.data = data
    for tensor in tensors:
        del group.key_to_tensor[group.tensor_to_key.pop(tensor)]
    group.parameters = [parameter for parameter in group.parameters if id(parameter) not in own]
