"""Where the parameters of a layer rest between forwards, for layers that accelerate offloads."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def resting_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that keeps parameter `name` of `layer` between forwards, to be read and written in place.

    That is the parameter itself, or accelerate's copy of it while the parameter is a placeholder on the meta device.
    `None` if the layer has no such parameter.
    """
    parameter: Tensor | None = getattr(layer, name, None)
    if parameter is None or parameter.device.type != "meta":
        return parameter
    for hook in accelerate_hooks(layer):
        weights = getattr(hook, "weights_map", None)
        if weights is not None and name in weights:
            return weights[name]
    return parameter


def accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks that accelerate has put on a module, if any."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
