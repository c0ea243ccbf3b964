"""What we know of the hooks diffusers and accelerate put on a model: where it computes, and in which dtype.

Nothing here installs or removes a foreign hook. Both libraries keep their hooks on the module as attributes, so
nothing needs to be imported to read them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from diffadapt.types.tensor_ops import FLOAT8

_FUSIBLE = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})


def compute_dtype(modules: Sequence[nn.Module]) -> torch.dtype:
    """The dtype a model, given as all its modules, computes in; layerwise casting stores its weights in another."""
    for module in _hooked(modules):
        casting = _diffusers_hook(module, "layerwise_casting")
        if casting is not None:
            return casting.compute_dtype
    for parameter in _parameters(modules):
        if parameter.is_floating_point() and parameter.dtype not in FLOAT8:
            return parameter.dtype
    return torch.float32


def execution_device(modules: Sequence[nn.Module]) -> torch.device:
    """Where the parameters of a new adapter have to be for the next forward of a model, from all its modules.

    Weights that a hook brings in layer by layer rest elsewhere (the meta device, CPU), so adapters loaded later go to
    the device the layers run on and stay there.
    """
    for module in _hooked(modules):
        for name in ("group_offloading", "lazy_prefetch_group_offloading"):
            offloading = _diffusers_hook(module, name)
            config = getattr(offloading, "config", None)
            if config is not None:
                return torch.device(config.onload_device)
        for hook in accelerate_hooks(module):
            if getattr(hook, "offload", False) and hook.execution_device is not None:
                return _device(hook.execution_device)
    for parameter in _parameters(modules):
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def is_bypassed(attention: nn.Module, name: str) -> bool:
    """Whether projection `name` of `attention` is not called any more, because diffusers fused it with its siblings."""
    if name not in _FUSIBLE or getattr(attention, "fused_projections", False) is not True:
        return False
    # The older attention class has no way back for the flag; there, unfusing only puts the plain processor back.
    processor = type(getattr(attention, "processor", None)).__name__
    return hasattr(attention, "unfuse_projections") or processor.startswith("Fused")


def copies_weights(modules: Sequence[nn.Module]) -> bool:
    """Whether offloading of a model, given as all its modules, keeps weights in a place of its own: with a stream in
    pinned memory, or on disk.
    """
    for module in _hooked(modules):
        for name in ("group_offloading", "lazy_prefetch_group_offloading"):
            config = getattr(_diffusers_hook(module, name), "config", None)
            if config is not None and (config.stream is not None or config.offload_to_disk_path is not None):
                return True
    return False


def diffusers_scales_with_peft() -> bool:
    """Whether diffusers hands per-call scales to peft. If not, it warns that they have no effect."""
    from diffusers import utils

    return bool(getattr(utils, "USE_PEFT_BACKEND", False))


def _parameters(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)


def _hooked(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Those that diffusers or accelerate have hooks on."""
    return [module for module in modules if "_diffusers_hook" in module.__dict__ or "_hf_hook" in module.__dict__]


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.hooks.get(name)


def accelerate_hooks(module: nn.Module) -> Iterator[Any]:
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))


def _device(device: Any) -> torch.device:
    # accelerate stores a bare index for "the accelerator number n", as torch does.
    return torch.device(device)
