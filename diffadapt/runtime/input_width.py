"""Input layers made wider for adapters that read more: Flux.1's control LoRAs take an image beside the latents.

The layer gets columns of zeros, with which it computes what it did, and the model's config says so, since pipelines ask
it how many channels to make. Adapter layers with fewer inputs than the layer get columns of zeros, too. What is there
at any time follows from the adapters that are attached: their order does not matter, and without the last of them the
layer is what it was. While it is wide, the model's state dict and config are those of the wide model.

Parameters stay the same objects, since optimisers and hooks hold them; only their content is exchanged.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.base_weights import resting_tensor
from diffadapt.runtime.foreign_hooks import copies_weights
from diffadapt.runtime.undo import Undo, UndoByCopy
from diffadapt.types.layer_spec import LayerSpec

_INPUTS = {"FluxTransformer2DModel": ("x_embedder", "proj_out")}
"""Class of a model -> its layer that reads the latents, and the one that writes them."""

_MOST = 8
_ORIGINAL = "_diffadapt_original"


@dataclass(frozen=True)
class _Original:
    """Of a layer that was made wider: the inputs it had, and entries that the model's config had."""

    inputs: int
    config: Mapping[str, Any]


def spec_for(model: nn.Module, path: str, spec: LayerSpec, columns: Mapping[str, int], tensors: Any) -> LayerSpec:
    """Geometry of a layer as an adapter's tensors have it: with their number of inputs, where the layer can get it.

    Args:
        columns: see `AdapterType.columns`.
        tensors: of a file, by name.
    """
    host, outputs = _host(model, path)
    if host is None or spec.kind != "linear":
        return spec
    found = {tensors[name].shape[axis] for name, axis in columns.items() if name in tensors and tensors[name].ndim == 2}
    # Nothing else is a plausible number, and no other layer may hide behind a wrong one.
    inputs = next(iter(found), 0) if len(found) == 1 else 0
    fits = 0 < inputs <= _MOST * outputs and inputs % outputs == 0
    return replace(spec, in_features=inputs) if fits else spec


def own_inputs(model: nn.Module, path: str) -> int | None:
    """Inputs that the model's layer at `path` has by itself, `None` for layers that are never made wider."""
    host, _ = _host(model, path)
    return None if host is None else _original(host).inputs


def fit_input_width_(
    model: nn.Module,
    adapters: Collection[Mapping[str, AdapterLayer | tuple[AdapterLayer, ...]]],
    undo: list[Undo],
) -> None:
    """Give the input layer the inputs that the widest of `adapters` needs, and all of them as many.

    Args:
        adapters: of each its layers by module path; the slots of a model are one of them.
        undo: see `Bank`; replaced for the layer's weight.

    Raises:
        AdapterError: the layer or one of the adapters cannot be changed. Nothing has changed then.
    """
    path, _ = _INPUTS.get(type(model).__name__, ("", ""))
    found = [adapter[path] for adapter in adapters if path in adapter]
    layers = [layer for each in found for layer in (each if isinstance(each, tuple) else (each,))]
    host, _ = _host(model, path)
    if host is None:
        return
    inputs = max(_original(host).inputs, *(layer.inputs for layer in layers), 0)
    for layer in layers:
        _refuse_inputs(path, layer, inputs)
    if inputs != host.in_features:
        _refuse_layer(model, path, host)
        _resize_(model, host, inputs, undo)
    for layer in layers:
        if layer.spec.in_features != inputs:
            layer.__dict__["spec"] = replace(layer.spec, in_features=inputs)
            for name, axis in layer.adapter_type.columns.items():
                if name in layer.tensors:
                    layer.tensors[name].data = _resized(layer.tensors[name].data, axis, inputs)


def _host(model: nn.Module, path: str) -> tuple[nn.Linear | None, int]:
    """The model's layer at `path` if it is the one that reads latents, and how many numbers a latent has."""
    reader, writer = _INPUTS.get(type(model).__name__, ("", ""))
    if path != reader:
        return None, 0
    host, written = model._modules.get(reader), model._modules.get(writer)
    if not isinstance(host, nn.Linear) or not isinstance(written, nn.Linear):
        return None, 0
    return host, written.out_features


def _original(host: nn.Linear) -> _Original:
    return host.__dict__.get(_ORIGINAL) or _Original(host.in_features, {})


def _refuse_inputs(path: str, layer: AdapterLayer, inputs: int) -> None:
    if layer.inputs == inputs or {"output", "gain"}.issuperset(layer.stages):
        return
    narrow, columns = layer.own_tensors, layer.adapter_type.columns
    wide = {name: _resized(t, columns[name], inputs) if name in columns else t for name, t in narrow.items()}
    try:
        layer.adapter_type.fit(wide, replace(layer.spec, in_features=inputs))
    except AdapterError as error:
        raise AdapterError(
            f"{path}: an adapter there ({layer.adapter_type.name}) has {layer.inputs} inputs and another needs "
            f"{inputs}, which the first cannot get ({error}); use them one at a time"
        ) from error


def _refuse_layer(model: nn.Module, path: str, host: nn.Linear) -> None:
    weight = resting_tensor(host, "weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise AdapterError(
            f"{path}: its weight is quantised ({type(weight).__name__}) and cannot get other inputs; leave the layer "
            "out when quantising the model"
        )
    if copies_weights(list(model.modules())):
        raise AdapterError(
            f"{path}: group offloading keeps a copy of its weight, which cannot get other inputs; load and remove the "
            "adapter without it"
        )


def _resize_(model: nn.Module, host: nn.Linear, inputs: int, undo: list[Undo]) -> None:
    was, original = host.in_features, _original(host)
    resting = resting_tensor(host, "weight")
    for number, way in enumerate(undo):
        if way.tensor is resting:
            undo[number] = UndoByCopy(way.tensor, _resized(way.restored(), 1, inputs))
    with torch.no_grad():
        for tensor in (host.weight, resting):
            if tensor is not None and tensor.shape[1] != inputs:
                tensor.data = _resized(tensor.data, 1, inputs)
    host.in_features = inputs
    config: Any = getattr(model, "config", None)
    entries = dict(original.config)
    if inputs != original.inputs and config is not None and config.get("in_channels") == was:
        entries = {"in_channels": inputs}
        if config.get("out_channels", was) is None:
            # It means as many as are read.
            entries["out_channels"] = was
        original = original if original.config else replace(original, config={k: config[k] for k in entries})
    if entries:
        model.register_to_config(**entries)  # type: ignore[operator]
    if inputs == original.inputs:
        host.__dict__.pop(_ORIGINAL, None)
    else:
        host.__dict__[_ORIGINAL] = original


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """A copy, cut or filled up with zeros along `axis`."""
    if tensor.shape[axis] >= size:
        return tensor.narrow(axis, 0, size).clone(memory_format=torch.contiguous_format)
    wide = tensor.new_zeros([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
    wide.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return wide
