"""From the model's layers back to those of its original layout, for files that other tools read.

The opposite of what `build.py` does with `parts.Piece`: query, key and value become one layer again, and the halves
of an adaptive norm change places. What was cut from one layer is put together as it was, whatever its type. What was
never one layer can be if it is LoRA or DoRA per output, with a block-diagonal `up`, or whole changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.families.family import Layout
from diffadapt.families.fused_parts import FusedPart
from diffadapt.types import named
from diffadapt.types.layer_state import LayerState


def original(layers: Mapping[str, LayerState], layout: Layout) -> dict[str, LayerState]:
    """The same adapter by the names of the original layout; layers that are not in it keep theirs.

    Raises:
        AdapterError: a layer's tensors cannot be joined with those of the layers that it is one with there.
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
                found[name] = _joined(
                    name, [(layers.get(part.path), size) for part, size in parts], parts[0][0].swapped
                )
    return found


def _joined(name: str, parts: Sequence[tuple[LayerState | None, int]], swapped: bool) -> LayerState:
    present = [layer for layer, _ in parts if layer is not None]
    joined = present[0] if len(parts) == 1 else _as_it_was(parts)
    types = sorted({layer.type for layer in present})
    if types == ["oft"] and len(present) == len(parts) and not swapped and _is_of_sd_scripts(present):
        blocks = {f"oft_blocks.{number}": layer.tensors["oft_blocks"] for number, layer in enumerate(present)}
        return replace(present[0], tensors=blocks)
    if joined is None and types == ["full"]:
        joined = _whole(name, parts)
    elif joined is None and types in (["lora"], ["dora"]):
        joined = _factors(name, parts, types[0])
    if joined is not None and swapped:
        joined = _swapped(joined, sum(size for _, size in parts))
    if joined is None:
        raise AdapterError(
            f"{name}: {' and '.join(types)} of {len(present)} layers cannot become the one layer that they are in this "
            "format; use format='diffusers' or 'peft', or to_lora() first"
        )
    return joined


def _as_it_was(parts: Sequence[tuple[LayerState | None, int]]) -> LayerState | None:
    """The layer that comes apart into just these parts, or `None` where they were never one layer."""
    layers = [layer for layer, _ in parts if layer is not None]
    first, adapter_type = layers[0], named(layers[0].type)
    if len(layers) < len(parts) or len({_joint(layer) for layer in layers}) > 1:
        return None
    if first.settings.get(adapter_type.alpha_is or "", 0.0) > 0 and "output" in _stages(first):
        # The limit of a rotation is over all outputs.
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
        if _comes_apart(tensors, first.type, parts):
            return replace(first, tensors=tensors)
    return None


def _stages(layer: LayerState) -> Sequence[str]:
    adapter_type = named(layer.type)
    return adapter_type.stages(layer.tensors, adapter_type.geometry(layer.tensors))


def _joint(layer: LayerState) -> tuple[object, ...]:
    """What parts of one layer have in common: all but their tensors' values and numbers of rows."""
    sides: list[tuple[str, int, tuple[int, ...]]] = []
    for name, tensor in sorted(layer.tensors.items()):
        axis = _axis_of_rows(tensor)
        sides.append((name, axis, (*tensor.shape[:axis], *tensor.shape[axis + 1 :])))
    return (layer.type, layer.scale, tuple(layer.settings.items()), *sides)


def _axis_of_rows(tensor: Tensor) -> int:
    """The first; the blocks of a butterfly are in its second."""
    return max(tensor.ndim - 3, 0)


def _comes_apart(tensors: Mapping[str, Tensor], type: str, parts: Sequence[tuple[LayerState | None, int]]) -> bool:
    """Whether the rows of these tensors are the parts, bit for bit."""
    adapter_type = named(type)
    whole = replace(adapter_type.geometry(tensors), out_features=sum(size for _, size in parts))
    start = 0
    for layer, size in parts:
        assert layer is not None
        try:
            cut = adapter_type.rows(tensors, whole, [range(start, start + size)])
        except AdapterError:
            return False
        if cut is None or not all(torch.equal(cut[name], tensor) for name, tensor in layer.tensors.items()):
            return False
        start += size
    return True


def _is_of_sd_scripts(layers: Sequence[LayerState]) -> bool:
    """Rotations that share a limit, which sd-scripts keeps by number for the parts of a fused projection."""
    limits = {tuple(sorted(layer.settings.items())) for layer in layers}
    blocks = all(set(layer.tensors) == {"oft_blocks"} for layer in layers)
    return blocks and len(limits) == 1 and layers[0].settings["constraint_eps"] > 0


def _factors(name: str, parts: Sequence[tuple[LayerState | None, int]], type: str) -> LayerState:
    """One LoRA or DoRA with a block-diagonal `up`, in which rows without an adapter are zero."""
    present = [layer for layer, _ in parts if layer is not None]
    if any("lora_mid" in layer.tensors for layer in present):
        raise AdapterError(f"{name}: a Tucker core cannot be joined; use to_lora() first")
    if type == "dora" and (len(present) < len(parts) or any(_by_input(layer) for layer in present)):
        raise AdapterError(f"{name}: a DoRA can be joined if all of it is there, per output; use to_lora() first")
    scales = {layer.scale for layer in present}
    common = scales.pop() if len(scales) == 1 else 1.0
    downs = [layer.tensors["lora_down"] for layer in present]
    ranks = sum(down.shape[0] for down in downs)
    like = present[0].tensors["lora_up"]
    up, biases = like.new_zeros(sum(size for _, size in parts), ranks), list[Tensor]()
    row = column = 0
    for layer, size in parts:
        if layer is not None:
            part = _times(layer.tensors["lora_up"], layer.scale / common)
            up[row : row + size, column : column + part.shape[1]] = part
            column += part.shape[1]
        bias = None if layer is None else layer.tensors.get("lora_bias")
        biases.append(like.new_zeros(size) if layer is None or bias is None else _times(bias, layer.scale / common))
        row += size
    tensors = {"lora_down": torch.cat(downs), "lora_up": up}
    if any("lora_bias" in layer.tensors for layer in present):
        tensors["lora_bias"] = torch.cat(biases)
    if type == "dora":
        tensors["dora_scale"] = torch.cat([layer.tensors["dora_scale"] for layer in present])
    return replace(present[0], tensors=tensors, rank=ranks, alpha=common * ranks)


def _whole(name: str, parts: Sequence[tuple[LayerState | None, int]]) -> LayerState:
    """One change of the weight, and of the bias, with zeros where there is none."""
    present = [layer for layer, _ in parts if layer is not None]
    if sum("set_weight" in layer.tensors for layer in present) not in (0, len(parts)):
        raise AdapterError(f"{name}: new weights can be joined if all of them are there")
    tensors: dict[str, Tensor] = {}
    for tensor in sorted({tensor for layer in present for tensor in layer.tensors}):
        like = next(layer.tensors[tensor] for layer in present if tensor in layer.tensors)
        rows = [
            layer.tensors[tensor]
            if layer is not None and tensor in layer.tensors
            else like.new_zeros(size, *like.shape[1:])
            for layer, size in parts
        ]
        tensors[tensor] = torch.cat(rows)
    return replace(present[0], tensors=tensors)


def _swapped(layer: LayerState, size: int) -> LayerState | None:
    """The same with the second half of the outputs first, or `None` if the type cannot be taken apart there."""
    adapter_type = named(layer.type)
    whole = replace(adapter_type.geometry(layer.tensors), out_features=size)
    tensors = adapter_type.rows(layer.tensors, whole, FusedPart("", swapped=True).rows(0, size))
    if tensors is None:
        return None
    rank = adapter_type.rank(tensors)
    # Ranks that no output uses are left out.
    alpha = layer.alpha if rank == layer.rank or rank is None else layer.scale * rank
    return replace(layer, tensors=tensors, rank=rank, alpha=alpha)


def _by_input(layer: LayerState) -> bool:
    return layer.tensors["dora_scale"].shape[1] > 1


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
