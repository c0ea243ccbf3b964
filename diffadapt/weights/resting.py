"""Where the parameters of a layer rest between forwards, for layers that accelerate or diffusers offloads."""

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_NOTED: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""Layer -> the group of diffusers' group offloading that it is in, for groups of whole blocks on disk."""


def resting_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that keeps parameter `name` of `layer` between forwards, to be read and written in place.

    That is the parameter itself, or accelerate's copy of it while the parameter is a placeholder on the meta device.
    Of a parameter on disk it is a copy, which is lost when written to; see `rests_on_disk`. `None` if the layer has no
    such parameter. HQQ's layers call their packed weight `W_q`.
    """
    parameter: Tensor | None = getattr(layer, name, None)
    if parameter is None and name == "weight":
        parameter = getattr(layer, "W_q", None)
    if parameter is None:
        return None
    group = _disk_group(layer, parameter)
    if group is not None:
        return _read(group, parameter)
    if parameter.device.type != "meta":
        return parameter
    for hook in accelerate_hooks(layer):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return parameter


def rests_on_disk(layer: nn.Module, name: str) -> bool:
    """Return whether a hook on `layer` reads parameter `name` from disk for every forward, so that writes are lost."""
    parameter: Tensor | None = getattr(layer, name, None)
    if parameter is None:
        return False
    if _disk_group(layer, parameter) is not None:
        return True
    for hook in accelerate_hooks(layer) if parameter.device.type == "meta" else ():
        weights: Any = getattr(hook, "weights_map", None)
        loader, key = getattr(weights, "dataset", weights), f"{getattr(weights, 'prefix', '')}{name}"
        if key in (getattr(loader, "index", None) or ()) and key not in getattr(loader, "state_dict", ()):
            return True
    return False


def disk_groups(module: nn.Module) -> Iterator[Any]:
    """Yield the groups of diffusers' group offloading whose tensors a hook on `module` reads from disk."""
    registry = module.__dict__.get("_diffusers_hook")
    for hook in () if registry is None else registry.hooks.values():
        group = getattr(hook, "group", None)
        if getattr(group, "offload_to_disk_path", None) is not None:
            yield group


def note_disk_group(layer: nn.Module, group: Any) -> None:
    """Remember that a hook on a module around `layer` reads the layer's parameters from disk with those of others."""
    _NOTED[layer] = group


def _disk_group(layer: nn.Module, parameter: Tensor) -> Any:
    groups = list(disk_groups(layer))
    # Within a call, which a graph is, the hook has read the parameter, and older versions of torch do not trace this.
    noted = None if torch.compiler.is_compiling() else _NOTED.get(layer)
    if noted is not None and any(group is noted for group in disk_groups(noted.offload_leader)):
        groups.append(noted)
    if not groups:
        return None
    return next((group for group in groups if parameter in group.tensor_to_key), None)


def _read(group: Any, parameter: Tensor) -> Tensor:
    """Return the content of a parameter from the file of its group, and leave the group as it is."""
    before = {tensor: tensor.data for tensor in group.tensor_to_key}
    group.onload_()
    content = parameter.data
    for tensor, data in before.items():
        tensor.data = data
    return content


def is_brought_for_calls(layer: nn.Module) -> bool:
    """Return whether accelerate brings what a layer consists of for its calls only."""
    return any(getattr(hook, "offload", False) for hook in accelerate_hooks(layer))


def accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that accelerate has put on a module, if any."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
