"""Adapters merged into the files of a model, tensor by tensor."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError, naming
from diffadapt.files.checkpoint import Source
from diffadapt.files.read import read
from diffadapt.files.rewrite import rewrite
from diffadapt.files.safetensors_file import OpenFile
from diffadapt.files.write import publish
from diffadapt.loading.plan import plan
from diffadapt.merging.moves import refuse_non_finite, within_range
from diffadapt.merging.weight_update import merge_dtype
from diffadapt.on_disk.placing import Parameter, Placed, Stored, place_all, targets_for
from diffadapt.on_disk.whole_models import StoredLayer, WholeModel, beside, open_model
from diffadapt.progress import with_progress
from diffadapt.runtime import compose
from diffadapt.runtime.adapter import Adapter
from diffadapt.to_lora.change import WeightedLayer
from diffadapt.weights import codec_of

_HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Entries of the metadata that are wrong once a tensor has changed."""

_Layers: TypeAlias = Mapping[tuple[str, str], Sequence[WeightedLayer]]
"""(component, path of a layer) -> the adapter layers on it."""


@torch.no_grad()
def merge_files(
    base: str | os.PathLike[str],
    adapters: Sequence[tuple[Source, float]],
    target: str | os.PathLike[str],
    *,
    family: str | None = None,
    models: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Write a copy of a model's files with adapters merged into the weights, as `pipe.adapters.merge` merges them.

    Names, layout, shards and dtypes are those of the base, and everything else in a folder is copied. Changes are added
    in float32 (float64 for float64 weights) and rounded once; of the base, one tensor at a time is in memory.

    Args:
        base: a safetensors file, or the folder of a saved pipeline or of one of its components.
        adapters: pairs of an adapter (a file, folder, hub id or state dict) and its strength.
        target: the file to write for a file, the folder to make for a folder.
        family: the family of the model; defaults to the one recognised from the names.
        models: component -> model with the layers of the base, also on the meta device; needed only where the base does
            not tell them and `family` is not published.

    Returns:
        The path of the file or folder written.

    Raises:
        AdapterError: an adapter cannot be used completely, the base lacks a layer that it changes, or a weight cannot
            hold the result. Nothing is left behind then.
    """
    source, goal = Path(base).expanduser(), Path(target).expanduser()
    if not adapters:
        raise AdapterError("no adapters to merge; pass at least one pair of a file and a strength")
    if goal.exists() and (goal.is_dir() or source.is_dir() or goal.resolve() == source.resolve()):
        raise AdapterError(f"{goal}: exists already; pass the path of a new {'folder' if source.is_dir() else 'file'}")
    whole = open_model(source)
    _, targets = targets_for(whole, family, models)
    placed = place_all(whole, targets)
    wrong = next(iter(placed.wrong.items()), None)
    if wrong is not None:
        raise AdapterError(f"{whole.origin}: {wrong[0]} {wrong[1]}")
    layers = _adapter_layers(adapters, {name: own.model for name, own in targets.items()})
    _refuse_missing(whole, placed, layers)
    merger = _Merger(whole, placed, layers)
    note = {"merged_adapters": json.dumps({_name_of(adapter): strength for adapter, strength in adapters})}
    goal.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        _write(source, goal, merger.changed(source), note)
        return goal
    unfinished = Path(tempfile.mkdtemp(dir=goal.parent, prefix=f".{goal.name}."))
    try:
        _copy_others(source, unfinished, whole)
        for file in whole.files:
            copy = unfinished / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if merger.touches(file):
                _write(file, copy, merger.changed(file), note)
            else:
                shutil.copyfile(file, copy)
        publish(unfinished, goal)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return goal


class _Merger:
    """The new contents of the tensors of a model that adapters change."""

    def __init__(self, whole: WholeModel, placed: Placed, layers: _Layers) -> None:
        self._whole = whole
        self._placed = placed
        self._layers = layers
        self._by_key: dict[str, list[tuple[Parameter, Stored]]] = {}
        for parameter, stored in placed.parameters.items():
            if (parameter.component, parameter.path) in layers:
                self._by_key.setdefault(stored.key, []).append((parameter, stored))
        for twin, key in placed.twins.items():
            if key in self._by_key:
                self._by_key[twin] = self._by_key[key]

    def touches(self, file: Path) -> bool:
        """Return whether an adapter changes a tensor of a file."""
        prefix = self._whole.files[file]
        return any(prefix + key in self._by_key for key in OpenFile(file).tensors)

    def changed(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a file that adapters change, by their names in it."""
        prefix, tensors = self._whole.files[file], OpenFile(file).tensors
        touched = [key for key in tensors if prefix + key in self._by_key]
        for key in with_progress(touched, "merging", "tensor"):
            with naming(prefix + key):
                yield from self._merged(key, prefix, self._by_key[prefix + key], tensors)

    def _merged(
        self, key: str, prefix: str, parts: Sequence[tuple[Parameter, Stored]], tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        original = self._whole.read(prefix + key)
        values = original.to(merge_dtype(original), copy=True)
        for parameter, stored in parts:
            own = stored.cut(values)
            layers = self._layers[parameter.component, parameter.path]
            merge = self._weight if parameter.name == "weight" else self._bias
            stored.put_(values, merge(parameter, own, layers))
        layer = beside(key, tensors)
        if len(layer) == 1:
            rounded = within_range(key, values, tensors[key].dtype).to(tensors[key].dtype)
            refuse_non_finite(key, rounded)
            if not torch.equal(rounded.view(torch.uint8), tensors[key].contiguous().view(torch.uint8)):
                yield key, rounded
            return
        refuse_non_finite(key, values)
        holder = StoredLayer(layer)
        encode = codec_of(holder, "weight").encode
        assert encode is not None
        path = key.rpartition(".")[0]
        for name, content in encode(holder, "weight", values).items():
            yield f"{path}.{name}", content

    def _weight(self, parameter: Parameter, own: Tensor, layers: Sequence[WeightedLayer]) -> Tensor:
        spec = layers[0].adapter_layer.spec
        canonical = spec.to_stored(own).reshape(spec.weight_shape)
        prepared = [layer.prepare_for_weight(canonical) for layer in layers]
        return spec.to_stored(compose.weight(prepared, canonical)).reshape(own.shape)

    def _bias(self, parameter: Parameter, own: Tensor, layers: Sequence[WeightedLayer]) -> Tensor:
        spec = layers[0].adapter_layer.spec
        base = torch.zeros((), dtype=own.dtype).expand(spec.weight_shape)
        stored = self._placed.parameters.get(parameter._replace(name="weight"))
        if stored is not None and any(layer.reads_base for layer in layers):
            base = spec.to_stored(stored.cut(self._whole.read(stored.key)).to(own.dtype)).reshape(spec.weight_shape)
        return compose.bias([layer.prepare_for_weight(base) for layer in layers], own)


def _adapter_layers(adapters: Sequence[tuple[Source, float]], models: Mapping[str, nn.Module]) -> _Layers:
    """Return the layers of all adapters, each with its strength."""
    found: dict[tuple[str, str], list[WeightedLayer]] = {}
    for source, strength in adapters:
        planned = plan(read(source), models, dtype=torch.float32, device=torch.device("cpu"))
        planned.refuse_faults(strict=True)
        if planned.tokens:
            raise AdapterError(f"{planned.checkpoint.origin}: learned tokens are no part of a model's weights")
        for component, layers in planned.layers.items():
            # An adapter gives its layers their gates.
            for path, layer in Adapter(layers).layers.items():
                if layer.widens:
                    raise AdapterError(
                        f"{planned.checkpoint.origin}: {component}.{path} reads a control image next to the latents, "
                        "and the merged model would have another config; load it into the pipeline"
                    )
                found.setdefault((component, path), []).append(WeightedLayer(layer, strength, {}))
    return found


def _refuse_missing(whole: WholeModel, placed: Placed, layers: _Layers) -> None:
    """Raise `AdapterError` if an adapter changes a parameter that the base does not have."""
    for (component, path), weighted in layers.items():
        has_bias = Parameter(component, path, "bias") in placed.parameters
        changes_bias = compose.changes_bias(
            ((layer.adapter_layer, layer.adapter_layer.tensors) for layer in weighted), has_bias
        )
        if Parameter(component, path, "weight") not in placed.parameters or (changes_bias and not has_bias):
            lacking = "bias" if Parameter(component, path, "weight") in placed.parameters else "weight"
            raise AdapterError(
                f"{whole.origin}: has no {lacking} for {component}.{path}, which an adapter changes; nothing was merged"
            )


def _write(file: Path, copy: Path, changed: Iterator[tuple[str, Tensor]], note: Mapping[str, str]) -> None:
    metadata = OpenFile(file).metadata
    rewrite(file, copy, changed, {**{k: v for k, v in metadata.items() if k not in _HASHES}, **note})


def _copy_others(source: Path, copy: Path, whole: WholeModel) -> None:
    """Copy a folder without its weights: those that are merged into, and other variants of these."""
    merged_folders = {file.parent for file in whole.files}

    def weights(folder: str, names: list[str]) -> list[str]:
        if Path(folder) not in merged_folders:
            return []
        return [name for name in names if name.endswith((".safetensors", ".bin", ".msgpack", ".onnx"))]

    shutil.copytree(source, copy, ignore=weights, dirs_exist_ok=True)


def _name_of(source: Source) -> str:
    return "a state dict" if isinstance(source, Mapping) else os.path.basename(os.fspath(source))
