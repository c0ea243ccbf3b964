"""The number of inputs of the layer that reads latents, which some adapters need to be larger than the model's own.

Flux.1's control LoRAs read a control image in addition to the latents. For such an adapter, columns of zeros are
appended to the weight of the layer, which leave its output unchanged, and to adapter layers with fewer inputs. The
model's config states the new number, since pipelines ask it how many channels to make.

The number of inputs is always what the attached adapters need. It does not depend on their order, and after the last of
them the layer is as it was. While the layer has more inputs, so do the model's state dict and config.

Parameters remain the same objects, since optimisers and hooks refer to them; only their content is replaced.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.foreign_hooks import copies_weights
from diffadapt.runtime.undo import Undo, UndoByCopy
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights.resting import resting_tensor

_LATENT_LAYERS = {"FluxTransformer2DModel": ("x_embedder", "proj_out")}
"""Class of a model -> the names of its layer that reads latents and of its layer that writes them."""

_CONTROL, _FILL = 2, 6
"""The inputs of Flux.1's models with additional ones, in latents: with a control image; with the image and the mask of
FLUX.1 Fill. Only the former are given to a model that has fewer, because only control pipelines feed them to any model.
"""

_ORIGINAL = "_diffadapt_original"


@dataclass(frozen=True)
class _Original:
    """What a layer with additional inputs had without them.

    Attributes:
        inputs: the number of inputs.
        config: the changed entries of the model's config.
    """

    inputs: int
    config: Mapping[str, Any]


def spec_for(model: nn.Module, path: str, spec: LayerSpec, columns: Mapping[str, int], tensors: Any) -> LayerSpec:
    """Return the geometry that the layer at `path` will have with an adapter from a file.

    This is `spec`, with the number of inputs of the adapter's tensors if the layer can get that many.

    Args:
        spec: the present geometry of the layer.
        columns: tensor name -> its axis of the inputs; see `AdapterType.columns`.
        tensors: the tensors in the file for this layer, by name.

    Raises:
        AdapterError: the adapter was made for a model with other inputs.
    """
    host, outputs = _host(model, path)
    if host is None or spec.kind != "linear":
        return spec
    found = {tensors[name].shape[axis] for name, axis in columns.items() if name in tensors and tensors[name].ndim == 2}
    inputs, own = next(iter(found), 0) if len(found) == 1 else 0, _original(host).inputs
    made_for = {_CONTROL * outputs: "a control LoRA", _FILL * outputs: "made for FLUX.1 Fill"}.get(inputs)
    if inputs in (own, outputs) or (inputs == _CONTROL * outputs and own == outputs):
        return replace(spec, in_features=inputs)
    if made_for is not None:
        raise AdapterError(
            f"the file is {made_for}: its layer has {inputs} inputs and that of this model has {own}; load it into the "
            "model that it was made for"
        )
    # Any other number means a file for another layer, which does not fit.
    return spec


def own_inputs(model: nn.Module, path: str) -> int | None:
    """Return the number of inputs of the layer at `path` without adapters; `None` if that number never changes."""
    host, _ = _host(model, path)
    return None if host is None else _original(host).inputs


def move_original_(host: nn.Module, successor: nn.Module) -> None:
    """Remember of the layer that replaced `host` what is remembered of `host`."""
    if _ORIGINAL in host.__dict__:
        successor.__dict__[_ORIGINAL] = host.__dict__.pop(_ORIGINAL)


def fit_input_width_(
    model: nn.Module,
    adapters: Collection[Mapping[str, AdapterLayer | tuple[AdapterLayer, ...]]],
    undo: list[Undo],
) -> None:
    """Give the layer that reads latents, and all adapter layers on it, as many inputs as the largest of them needs.

    Args:
        adapters: module path -> adapter layer or slots, for every adapter and for the slots of the model.
        undo: the ways back in the model's bank. The one of the layer's weight is replaced.

    Raises:
        AdapterError: the layer or an adapter layer cannot be changed. Nothing is changed then.
    """
    path, _ = _LATENT_LAYERS.get(type(model).__name__, ("", ""))
    found = [adapter[path] for adapter in adapters if path in adapter]
    layers = [layer for each in found for layer in (each if isinstance(each, tuple) else (each,))]
    host, _ = _host(model, path)
    if host is None:
        return
    inputs = max(_original(host).inputs, *(layer.inputs for layer in layers), 0)
    for layer in layers:
        _refuse_inputs(path, layer, inputs)
    if inputs != host.in_features:
        _refuse_layer(model, path, host, undo)
        _resize_(model, host, inputs, undo)
    for layer in layers:
        if layer.spec.in_features != inputs:
            layer.__dict__["spec"] = replace(layer.spec, in_features=inputs)
            for name, axis in layer.adapter_type.columns.items():
                if name in layer.tensors:
                    layer.tensors[name].data = _resized(layer.tensors[name].data, axis, inputs)


def _host(model: nn.Module, path: str) -> tuple[nn.Linear | None, int]:
    """Return the layer at `path` if it is the one that reads latents, else `None`, and the size of a latent."""
    reader, writer = _LATENT_LAYERS.get(type(model).__name__, ("", ""))
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
    columns = layer.adapter_type.columns
    tensors = {n: _resized(t, columns[n], inputs) if n in columns else t for n, t in layer.own_tensors.items()}
    try:
        layer.adapter_type.fit(tensors, replace(layer.spec, in_features=inputs))
    except AdapterError as error:
        raise AdapterError(
            f"{path}: an adapter there ({layer.adapter_type.name}) has {layer.inputs} inputs and another needs "
            f"{inputs}, which the first cannot be given ({error}); use them one at a time"
        ) from error


def _refuse_layer(model: nn.Module, path: str, host: nn.Linear, undo: Sequence[Undo]) -> None:
    weight = resting_tensor(host, "weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise AdapterError(
            f"{path}: its weight is quantised ({type(weight).__name__}), so its number of inputs cannot be changed; "
            "leave the layer out when quantising the model"
        )
    if any(way.tensor is weight and way.restored().dtype != weight.dtype for way in undo):
        raise AdapterError(
            f"{path}: adapters are merged into its quantised weight, so its number of inputs cannot be changed; call "
            "unmerge() first"
        )
    if copies_weights(list(model.modules())):
        raise AdapterError(
            f"{path}: group offloading keeps a copy of its weight, so its number of inputs cannot be changed; load and "
            "remove the adapter without group offloading"
        )


def _resize_(model: nn.Module, host: nn.Linear, inputs: int, undo: list[Undo]) -> None:
    """Give `host` this number of inputs, in its weight, its way back, `in_features` and the model's config."""
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
            # `None` means as many as `in_channels`.
            entries["out_channels"] = was
        original = original if original.config else replace(original, config={k: config[k] for k in entries})
    if entries:
        model.register_to_config(**entries)  # type: ignore[operator]
    if inputs == original.inputs:
        host.__dict__.pop(_ORIGINAL, None)
    else:
        host.__dict__[_ORIGINAL] = original


def _resized(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a copy of `tensor` with `size` elements along `axis`, cut or padded with zeros."""
    if tensor.shape[axis] >= size:
        return tensor.narrow(axis, 0, size).clone(memory_format=torch.contiguous_format)
    padded = tensor.new_zeros([*tensor.shape[:axis], size, *tensor.shape[axis + 1 :]])
    padded.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return padded
