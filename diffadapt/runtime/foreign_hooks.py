"""Reading the hooks and flags that diffusers and accelerate set on a model: device, dtype, fused projections.

Nothing here installs or removes a hook. Both libraries keep their hooks as attributes of the module, so nothing needs
to be imported to read them.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffadapt.types.tensor_ops import FLOAT8
from diffadapt.weights.resting import accelerate_hooks

_FUSIBLE = frozenset({"to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"})


def compute_dtype(modules: Sequence[nn.Module]) -> torch.dtype:
    """Return the dtype that most of a model's layers compute in.

    It is not always the dtype of their weights: not of quantised layers, nor under layerwise casting. And models in
    half precision keep some tables and norms in float32.

    Args:
        modules: all modules of the model.
    """
    attributes = [module.__dict__ for module in modules]
    # Most models have one dtype, and no layer that says otherwise: then its sizes need not be added up.
    if not any("_diffusers_hook" in own or "compute_dtype" in own or "dtype" in own for own in attributes):
        weights = (own["_parameters"].get("weight") for own in attributes)
        dtypes = {weight.dtype for weight in weights if weight is not None}
        if len(dtypes) == 1 and (dtype := dtypes.pop()).is_floating_point and dtype not in FLOAT8:
            return dtype
    sizes: dict[torch.dtype, int] = {}
    for module in modules:
        if "_diffusers_hook" in module.__dict__:
            casting = _diffusers_hook(module, "layerwise_casting")
            if casting is not None:
                return casting.compute_dtype
        size, dtype = _matrix(module)
        if dtype is not None:
            sizes[dtype] = sizes.get(dtype, 0) + size
    if sizes:
        return max(sizes, key=lambda dtype: sizes[dtype])
    for parameter in _parameters(modules):
        if parameter.is_floating_point() and parameter.dtype not in FLOAT8:
            return parameter.dtype
    return torch.float32


def _matrix(module: nn.Module) -> tuple[int, torch.dtype | None]:
    """Return the size of a layer's weight and the dtype that the layer computes in; `None` if it does not say."""
    attributes = module.__dict__
    if "compute_dtype" in attributes or "dtype" in attributes:
        is_embedding = isinstance(module, nn.Embedding)
        own = attributes.get("dtype" if is_embedding else "compute_dtype")
        if isinstance(own, torch.dtype):
            # A quantised layer, whose packed weight may be floating-point, too (`quant_storage` of bitsandbytes).
            names = ("num_embeddings", "embedding_dim") if is_embedding else ("out_features", "in_features")
            return math.prod(getattr(module, name, 1) for name in names), own
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim < 2 or not weight.is_floating_point() or weight.dtype in FLOAT8:
        return 0, None
    return weight.numel(), weight.dtype


def execution_device(modules: Sequence[nn.Module]) -> torch.device:
    """Return the device on which a model computes, where the parameters of a new adapter belong.

    Between calls, weights that a hook loads layer by layer are elsewhere (on the meta device or the CPU). Adapters go
    to the device on which the layers run, and stay there.

    Args:
        modules: all modules of the model.
    """
    for module in _hooked(modules):
        device = _onload_device(module) or _offload_device(module)
        if device is not None:
            return device
    for parameter in _parameters(modules):
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


def layer_devices(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, torch.device]:
    """Return the device on which each of some layers computes, if a model is spread over several; else nothing.

    Args:
        model: the model.
        layers: module path -> layer of the model.
    """
    found: dict[str, torch.device] = {}
    for path, layer in layers.items():
        device = _offload_device(layer)
        for parameter in layer._parameters.values() if device is None else ():
            if parameter is not None:
                device = parameter.device
                break
        if device is not None and device.type != "meta":
            found[path] = device
    if len(set(found.values())) < 2:
        return {}
    # Group offloading moves weights between devices, and computes on one.
    return {} if any(_onload_device(module) is not None for module in model.modules()) else found


def input_device(layer: nn.Module) -> torch.device | None:
    """Return the device to which a hook of accelerate moves a layer's input for good; `None` if none does."""
    for hook in accelerate_hooks(layer):
        device = getattr(hook, "execution_device", None)
        if device is not None and not getattr(hook, "io_same_device", False):
            return torch.device(device)
    return None


def is_fusible(module: nn.Module) -> bool:
    """Return whether diffusers can fuse projections of a module."""
    # It takes a module ten times as long as a class to miss an attribute.
    return "fused_projections" in module.__dict__ or hasattr(type(module), "fused_projections")


def is_bypassed(attention: nn.Module, name: str) -> bool:
    """Return whether projection `name` of `attention` is no longer called because diffusers fused it with others."""
    if name not in _FUSIBLE or getattr(attention, "fused_projections", False) is not True:
        return False
    # The older attention class never resets the flag: unfusing only restores the plain processor there.
    processor = type(getattr(attention, "processor", None)).__name__
    return hasattr(attention, "unfuse_projections") or processor.startswith("Fused")


def copies_weights(modules: Sequence[nn.Module]) -> bool:
    """Return whether group offloading keeps a copy of a model's weights: in pinned memory (with a stream) or on disk.

    Args:
        modules: all modules of the model.
    """
    for module in _hooked(modules):
        found = _group_offloading(module)
        if found is not None and (found.stream is not None or getattr(found, "offload_to_disk_path", None) is not None):
            return True
    return False


def diffusers_scales_with_peft() -> bool:
    """Return whether diffusers hands per-call scales to peft. If not, it warns that they have no effect."""
    from diffusers import utils

    return bool(getattr(utils, "USE_PEFT_BACKEND", False))


def scales_with_peft(model: nn.Module) -> bool:
    """Return whether diffusers hands the scale of a call of `model` to layers of peft in it."""
    # Layers of peft come and go without a trace that could be kept, so every call looks, but not before peft is used.
    return "peft" in sys.modules and diffusers_scales_with_peft() and has_peft_layers(model)


def has_peft_layers(model: nn.Module) -> bool:
    """Return whether a model has layers of peft, each of which has the layer that it replaces as a child."""
    # `model.modules()` takes five times as long.
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        children = {} if module is None else module._modules
        if "base_layer" in children:
            return True
        waiting.extend(children.values())
    return False


def _parameters(modules: Sequence[nn.Module]) -> Iterator[nn.Parameter]:
    return (parameter for module in modules for parameter in module._parameters.values() if parameter is not None)


def _hooked(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that have hooks of diffusers or accelerate."""
    return [module for module in modules if "_diffusers_hook" in module.__dict__ or "_hf_hook" in module.__dict__]


def _diffusers_hook(module: nn.Module, name: str) -> Any:
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.hooks.get(name)


def _group_offloading(module: nn.Module) -> Any:
    """Return what says how diffusers' group offloading treats a module; `None` if it is not offloaded."""
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        hook = _diffusers_hook(module, name)
        # Before diffusers 0.35, the group says it, and the hook of lazy prefetching, which never comes alone, does not.
        found = getattr(hook, "config", None) or getattr(hook, "group", None)
        if found is not None:
            return found
    return None


def _onload_device(module: nn.Module) -> torch.device | None:
    """Return the device to which diffusers' group offloading brings the weights of a module."""
    found = _group_offloading(module)
    return None if found is None else torch.device(found.onload_device)


def _offload_device(module: nn.Module) -> torch.device | None:
    """Return the device to which accelerate brings the weights of a module for its call, if it offloads them."""
    for hook in accelerate_hooks(module) if "_hf_hook" in module.__dict__ else ():
        if getattr(hook, "offload", False) and hook.execution_device is not None:
            # It may be a bare index, which means the accelerator of that number, as in torch.
            return torch.device(hook.execution_device)
    return None
