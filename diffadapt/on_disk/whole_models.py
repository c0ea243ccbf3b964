"""Whole models: files, folders, state dicts and modules, with tensors that are read one at a time."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt import families
from diffadapt.errors import AdapterError
from diffadapt.files.safetensors_file import OpenFile
from diffadapt.pipelines.components import components_of, likely_role_of
from diffadapt.pipelines.saved import model_of, models_of
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.components import is_text_encoder, unwrapped
from diffadapt.runtime.targets import walk
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights import codec_of, decoded
from diffadapt.weights.plain import PLAIN
from diffadapt.weights.scaled import SCALES

ModelSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Any
"""A safetensors file, the folder of a pipeline or of one of its components, a state dict, a module or a pipeline."""

_BESIDE_DENOISERS = ("connectors", "text_conditioner")
_SAME = "diffusion_pytorch_model", "model"
"""How the weight files in a component's folder begin, without the name of a variant."""


@dataclass(frozen=True)
class WholeModel:
    """The tensors of a whole model by name.

    Attributes:
        origin: what messages call the model.
        shapes: key -> shape of the tensor. Keys begin with the component if the source tells it:
            "unet.conv_in.weight".
        read: returns the tensor of a key as floating-point numbers in the layout of the file: memory-mapped pages where
            it is stored like that, decoded float32 where it has a scale beside it.
        files: weight file -> prefix of its keys in `shapes`; empty for a model in memory.
        models: component -> model whose layers the keys belong to, perhaps on the meta device; `None` if the source
            does not tell.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    files: Mapping[Path, str] = field(default_factory=dict[Path, str])
    models: Mapping[str, nn.Module] | None = None


def open_model(source: ModelSource) -> WholeModel:
    """Open a whole model. Values are read when they are asked for.

    Raises:
        AdapterError: the source is no model, or its weights are in files that are not read (pickles).
    """
    if isinstance(source, nn.Module):
        model = unwrapped(source)
        return _of_modules(f"the {type(model).__name__}", {likely_role_of(model): model})
    if isinstance(source, Mapping):
        return _of_tensors("the state dict", source, {}, None)  # type: ignore[arg-type]
    if isinstance(getattr(source, "components", None), Mapping):
        return _of_modules(f"the {type(source).__name__}", components_of(source))
    try:
        path = Path(os.fspath(source)).expanduser()
    except TypeError as error:
        raise AdapterError(
            f"a {type(source).__name__} is no model; pass a file, a folder, a state dict, a module or a pipeline"
        ) from error
    if path.is_file():
        models = _beside(path.parent)
        prefix = "" if models is None else f"{next(iter(models))}."
        return _of_files(str(path), {path: prefix}, models)
    if not path.is_dir():
        raise AdapterError(f"{path}: no such file or folder; models are not downloaded here")
    if (path / "model_index.json").is_file():
        found = {file: f"{folder.name}." for folder in _component_folders(path) for file in weight_files(folder)}
        return _of_files(str(path), found, carriers(models_of(path)))
    models = _beside(path)
    prefix = "" if models is None else f"{next(iter(models))}."
    return _of_files(str(path), dict.fromkeys(weight_files(path), prefix), models)


def carriers(models: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the components that adapters are for: denoisers, text encoders and what is between them."""
    return {
        name: model
        for name, model in models.items()
        if is_text_encoder(name) or name.startswith((*families.DENOISERS, *_BESIDE_DENOISERS))
    }


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of one model, of the variant without a name if there are several.

    Raises:
        AdapterError: there are none.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    plain = [path for path in found if path.name.split(".")[0].split("-0")[0] in _SAME and path.name.count(".") == 1]
    if not found:
        pickles = [path.name for path in folder.glob("*.bin")]
        other = f"only {pickles[0]}, a pickle; save it as safetensors" if pickles else "expected *.safetensors"
        raise AdapterError(f"{folder}: no weights there, {other}")
    return plain or found


def _component_folders(folder: Path) -> Iterator[Path]:
    for inner in sorted(folder.iterdir()):
        if (inner / "config.json").is_file() and any(inner.glob("*.safetensors")):
            yield inner


def _beside(folder: Path) -> dict[str, nn.Module] | None:
    """Return the model of the `config.json` in a folder by its component name, or `None` without such a config."""
    model = model_of(folder)
    if model is None:
        return None
    name = folder.resolve().name
    return {name if carriers({name: model}) else likely_role_of(model): model}


def _of_modules(origin: str, models: Mapping[str, nn.Module]) -> WholeModel:
    for component, model in models.items():
        bank = bank_of(model)
        unmerged = [name for name, adapter in bank.adapters.items() if adapter.active] if bank is not None else []
        unmerged = [name for name in unmerged if bank is not None and name not in bank.merged]
        if unmerged:
            raise AdapterError(
                f"{origin}: {', '.join(unmerged)} acts on its {component} but is not in its weights; merge or remove it"
            )
    layers: dict[str, tuple[nn.Module, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for component, model in models.items():
        for path, module in (("", model), *walk(model)):
            spec = LayerSpec.of(module)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    key = ".".join(filter(None, (component, path, name)))
                    layers[key] = module, name
                    # Quantised layers pack their weights.
                    is_packed = name == "weight" and spec is not None and codec_of(module, name) is not PLAIN
                    shapes[key] = _stored_shape(spec) if is_packed and spec is not None else tuple(parameter.shape)

    def read(key: str) -> Tensor:
        module, name = layers[key]
        codec = codec_of(module, name)
        if codec is PLAIN and not module._parameters[name].is_meta:  # type: ignore[union-attr]
            return module._parameters[name].detach()  # type: ignore[union-attr]
        return decoded(module, name)

    return WholeModel(origin, shapes, read, models=models)


def _stored_shape(spec: LayerSpec) -> tuple[int, ...]:
    shape = spec.weight_shape
    return tuple(reversed(shape)) if spec.transposed else shape


def _of_files(origin: str, files: Mapping[Path, str], models: Mapping[str, nn.Module] | None) -> WholeModel:
    tensors: dict[str, Tensor] = {}
    for file, prefix in files.items():
        for key, tensor in OpenFile(file).tensors.items():
            name = prefix + key
            if name in tensors:
                raise AdapterError(f"{origin}: {name} is in more than one file; keep one variant of the weights there")
            tensors[name] = tensor
    return _of_tensors(origin, tensors, files, models)


def _of_tensors(
    origin: str, tensors: Mapping[str, Tensor], files: Mapping[Path, str], models: Mapping[str, nn.Module] | None
) -> WholeModel:
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if not _is_scale(key, tensors)}
    return WholeModel(origin, shapes, partial(_read, origin, tensors), files, models)


class StoredLayer(nn.Module):
    """The tensors that a file has for one layer, for codecs to read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def beside(key: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors from which the parameter `key` is read, by their names in the layer: itself and a scale."""
    path, _, name = key.rpartition(".")
    scales = {scale: f"{path}.{scale}" for scale in SCALES if name == "weight"}
    return {name: tensors[key], **{scale: tensors[k] for scale, k in scales.items() if k in tensors}}


def _read(origin: str, tensors: Mapping[str, Tensor], key: str) -> Tensor:
    stored = beside(key, tensors)
    tensor = tensors[key]
    if not tensor.is_floating_point():
        raise AdapterError(
            f"{origin}: {key} is {tensor.dtype}, a quantised weight that is not read from files; load the model, call "
            "its dequantize() and pass the model"
        )
    if len(stored) > 1:
        return decoded(StoredLayer(stored), "weight")
    return tensor


def _is_scale(key: str, tensors: Mapping[str, Tensor]) -> bool:
    path, _, name = key.rpartition(".")
    return name in SCALES and f"{path}.weight" in tensors


@torch.no_grad()
def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal once either is rounded to the dtype of the other."""
    return one.shape == other.shape and (
        torch.equal(other.to(one.dtype), one) or torch.equal(one.to(other.dtype), other)
    )
