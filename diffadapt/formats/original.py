"""Joining the adapter layers of a model into layers of its original layout, for files that other tools read.

This is the inverse of cutting a layer of a file into its `FusedPart`s (`loading/build.py`): query, key and value become
one layer again, and the halves of an adaptive norm are swapped. Layers that were cut from one layer are joined to
exactly that layer, whatever their type. Others can be joined if they are LoRAs or DoRAs per output, which get a
block-diagonal `up`, or whole changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.families.family import Layout
from diffadapt.families.fused_parts import FusedPart
from diffadapt.types import named
from diffadapt.types.layer_state import LayerState

_SizedLayers: TypeAlias = Sequence[tuple[LayerState | None, int]]
"""For every part of a fused layer, in their order: the adapter layer, if there is one, and the number of outputs."""


def in_original_layout(layers: Mapping[str, LayerState], layout: Layout) -> dict[str, LayerState]:
    """Return the same adapter in the original layout of its model.

    Args:
        layers: path of the model's layer -> adapter layer.
        layout: the original layout. Layers that are not in it keep their names.

    Raises:
        AdapterError: the tensors of layers that are one layer in the original layout cannot be joined.
    """
    names = {part.path: name for name, parts in layout.items() for part, _ in parts}
    found: dict[str, LayerState] = {}
    for path, layer in layers.items():
        name = names.get(path)
        if name is None:
            found[path] = layer
        elif name not in found:
            parts = layout[name]
            if len(parts) == 1 and not parts[0][0].swapped:
                found[name] = layer
            else:
                sized = [(layers.get(part.path), size) for part, size in parts]
                found[name] = _join(name, sized, parts[0][0].swapped)
    return found


def join_groups(layers: Mapping[str, LayerState], fused: Layout) -> dict[str, LayerState]:
    """Return the same adapter, with layers that cannot be saved apart joined to the layers that files have instead.

    Args:
        layers: path of the layer -> adapter layer.
        fused: fused layers that files may have.
    """
    found = dict(layers)
    for name, parts in fused.items() if any(layer.group for layer in layers.values()) else ():
        sized = [(found.get(part.path), size) for part, size in parts]
        if all(layer is not None and layer.group for layer, _ in sized) and _may_join(sized):
            joined = _join(name, sized, parts[0][0].swapped)
            for part, _ in parts:
                del found[part.path]
            found[name] = joined
    return found


def _join(name: str, sized: _SizedLayers, swapped: bool) -> LayerState:
    """Return one layer for the parts of the fused layer `name`, whose halves of outputs may be swapped."""
    present = [layer for layer, _ in sized if layer is not None]
    joined = present[0] if len(sized) == 1 else _uncut(sized)
    types = sorted({layer.type for layer in present})
    if types == ["oft"] and len(present) == len(sized) and not swapped and _have_common_limit(present):
        blocks = {f"oft_blocks.{number}": layer.tensors["oft_blocks"] for number, layer in enumerate(present)}
        return replace(present[0], tensors=blocks)
    if joined is None and types == ["full"]:
        joined = _join_changes(name, sized)
    elif joined is None and types in (["lora"], ["dora"]):
        joined = _join_factors(name, sized, types[0])
    if joined is not None and swapped:
        joined = _swap_halves(joined, sum(size for _, size in sized))
    if joined is None:
        raise AdapterError(
            f"{name}: {' and '.join(types)} of {len(present)} layers cannot become the one layer that they are in this "
            "format"
        )
    return joined


def _uncut(sized: _SizedLayers) -> LayerState | None:
    """Return the layer that is cut into exactly these layers, or `None` if there is none."""
    layers = [layer for layer, _ in sized if layer is not None]
    first, adapter_type = layers[0], named(layers[0].type)
    if len(layers) < len(sized) or len({_common_traits(layer) for layer in layers}) > 1 or not _may_join(sized):
        return None
    if first.settings.get(adapter_type.alpha_is or "", 0.0) > 0 and "output" in _stages(first):
        # The limit of a rotation applies to all outputs together.
        return None
    equal = {
        name for name, tensor in first.tensors.items() if all(torch.equal(tensor, t.tensors[name]) for t in layers)
    }
    for common in (equal, set[str]()):
        tensors = {
            name: tensor
            if name in common
            else torch.cat([layer.tensors[name] for layer in layers], dim=_axis_of_rows(tensor))
            for name, tensor in first.tensors.items()
        }
        if _is_cut_into(tensors, first.type, sized):
            return replace(first, tensors=tensors, group=frozenset())
    return None


def _may_join(sized: _SizedLayers) -> bool:
    """Return whether these layers are all parts of one layer of a file, if their type asks for it."""
    layers = [layer for layer, _ in sized if layer is not None]
    if not any(named(layer.type).joint(layer.tensors) for layer in layers):
        return True
    groups = {layer.group for layer in layers}
    return len(groups) == 1 and len(layers[0].group) == len(layers) == len(sized)


def _stages(layer: LayerState) -> Sequence[str]:
    adapter_type = named(layer.type)
    return adapter_type.stages(layer.tensors, adapter_type.geometry(layer.tensors))


def _common_traits(layer: LayerState) -> tuple[object, ...]:
    """Return what layers cut from one layer have in common: everything but the values and row counts of tensors."""
    sides: list[tuple[str, int, tuple[int, ...]]] = []
    for name, tensor in sorted(layer.tensors.items()):
        axis = _axis_of_rows(tensor)
        sides.append((name, axis, (*tensor.shape[:axis], *tensor.shape[axis + 1 :])))
    return (layer.type, layer.scale, tuple(layer.settings.items()), layer.group, *sides)


def _axis_of_rows(tensor: Tensor) -> int:
    """Return the axis along which a tensor has the outputs: the first, or the second for the blocks of a butterfly."""
    return max(tensor.ndim - 3, 0)


def _is_cut_into(tensors: Mapping[str, Tensor], type: str, sized: _SizedLayers) -> bool:
    """Return whether cutting the rows of these tensors returns the given layers bit for bit."""
    adapter_type = named(type)
    start = 0
    for layer, size in sized:
        assert layer is not None
        try:
            spec = replace(adapter_type.geometry(tensors), out_features=sum(size for _, size in sized))
            cut = adapter_type.rows(tensors, spec, [range(start, start + size)])
        except AdapterError:
            return False
        if cut is None or not all(torch.equal(cut[name], tensor) for name, tensor in layer.tensors.items()):
            return False
        start += size
    return True


def _have_common_limit(layers: Sequence[LayerState]) -> bool:
    """Return whether the layers are rotations with equal limits, which sd-scripts numbers as parts of one layer."""
    limits = {tuple(sorted(layer.settings.items())) for layer in layers}
    blocks = all(set(layer.tensors) == {"oft_blocks"} for layer in layers)
    return blocks and len(limits) == 1 and layers[0].settings["constraint_eps"] > 0


def _join_factors(name: str, sized: _SizedLayers, type: str) -> LayerState:
    """Return one LoRA or DoRA with a block-diagonal `up`, in which the rows of layers without an adapter are zero."""
    present = [layer for layer, _ in sized if layer is not None]
    if any("lora_mid" in layer.tensors for layer in present):
        raise AdapterError(f"{name}: a Tucker core cannot be joined")
    if type == "dora" and (len(present) < len(sized) or not _may_join(sized)):
        raise AdapterError(f"{name}: DoRAs can be joined only if all layers have one, with a length for every output")
    scales = {layer.scale for layer in present}
    common = scales.pop() if len(scales) == 1 else 1.0
    downs = [layer.tensors["lora_down"] for layer in present]
    ranks = sum(down.shape[0] for down in downs)
    like = present[0].tensors["lora_up"]
    up, biases = like.new_zeros(sum(size for _, size in sized), ranks), list[Tensor]()
    row = column = 0
    for layer, size in sized:
        if layer is not None:
            block = _times(layer.tensors["lora_up"], layer.scale / common)
            up[row : row + size, column : column + block.shape[1]] = block
            column += block.shape[1]
        bias = None if layer is None else layer.tensors.get("lora_bias")
        biases.append(like.new_zeros(size) if layer is None or bias is None else _times(bias, layer.scale / common))
        row += size
    tensors = {"lora_down": torch.cat(downs), "lora_up": up}
    if any("lora_bias" in layer.tensors for layer in present):
        tensors["lora_bias"] = torch.cat(biases)
    if type == "dora":
        first, *others = lengths = [layer.tensors["dora_scale"] for layer in present]
        is_joint = named(type).joint(present[0].tensors)
        if is_joint and not all(torch.equal(first, other) for other in others):
            raise AdapterError(f"{name}: its layers have a length for every input in common, but were trained apart")
        tensors["dora_scale"] = first if is_joint else torch.cat(lengths)
    return replace(present[0], tensors=tensors, rank=ranks, alpha=common * ranks, group=frozenset())


def _join_changes(name: str, sized: _SizedLayers) -> LayerState:
    """Return one whole change of the weight and of the bias, with zeros for layers without an adapter."""
    present = [layer for layer, _ in sized if layer is not None]
    if sum("set_weight" in layer.tensors for layer in present) not in (0, len(sized)):
        raise AdapterError(f"{name}: new weights can be joined only if all layers have one")
    tensors: dict[str, Tensor] = {}
    for tensor_name in sorted({name for layer in present for name in layer.tensors}):
        like = next(layer.tensors[tensor_name] for layer in present if tensor_name in layer.tensors)
        rows = [
            layer.tensors[tensor_name]
            if layer is not None and tensor_name in layer.tensors
            else like.new_zeros(size, *like.shape[1:])
            for layer, size in sized
        ]
        tensors[tensor_name] = torch.cat(rows)
    return replace(present[0], tensors=tensors)


def _swap_halves(layer: LayerState, size: int) -> LayerState | None:
    """Return the layer with the second half of its outputs first, or `None` if its tensors cannot be cut there."""
    adapter_type = named(layer.type)
    spec = replace(adapter_type.geometry(layer.tensors), out_features=size)
    tensors = adapter_type.rows(layer.tensors, spec, FusedPart("", swapped=True).rows(0, size))
    if tensors is None:
        return None
    rank = adapter_type.rank(tensors)
    # `rows` drops the ranks that no output uses.
    alpha = layer.alpha if rank == layer.rank or rank is None else layer.scale * rank
    return replace(layer, tensors=tensors, rank=rank, alpha=alpha)


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
