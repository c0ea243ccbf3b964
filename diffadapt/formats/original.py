"""From the model's layers back to those of its original layout, for files that other tools read.

The opposite of what `build.py` does with `pieces.Piece`: query, key and value become one layer again, with a
block-diagonal `up`, and the halves of an adaptive norm change places. Only LoRA, DoRA per output and whole changes can
be joined exactly; layers that are one layer in both layouts keep their type.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.layer import pick
from diffadapt.state import LayerState, Layout

_JOINED = ("lora", "dora", "full")


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
    types = sorted({layer.type for layer in present})
    if types == ["oft"] and len(present) == len(parts) and not swapped and _is_of_sd_scripts(present):
        blocks = {f"oft_blocks.{number}": layer.tensors["oft_blocks"] for number, layer in enumerate(present)}
        return replace(present[0], tensors=blocks)
    if len(types) > 1 or types[0] not in _JOINED:
        raise AdapterError(
            f"{name}: {' and '.join(types)} of {len(present)} layers cannot become the one layer that they are in this "
            "format; use format='diffusers' or 'peft', or to_lora() first"
        )
    if len(parts) > 1:
        joined = _whole(name, parts) if types[0] == "full" else _factors(name, parts, types[0])
    else:
        joined = present[0]
    return _swapped(joined, sum(size for _, size in parts)) if swapped else joined


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
    if len(present) == len(parts) and len(scales) == 0 and all(torch.equal(downs[0], down) for down in downs[1:]):
        # They were one layer before.
        names = sorted({name for layer in present for name in layer.tensors} - {"lora_down"})
        if all(name in layer.tensors for name in names for layer in present):
            joined = {name: torch.cat([layer.tensors[name] for layer in present]) for name in names}
            return replace(present[0], tensors={"lora_down": downs[0], **joined})
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


def _swapped(layer: LayerState, size: int) -> LayerState:
    """The same with the second half of the outputs first."""
    if layer.type == "dora" and _by_input(layer):
        rows = ("lora_up",)
    else:
        rows = ("lora_up", "lora_bias", "dora_scale", "diff", "set_weight", "diff_b")
    halves = (range(size // 2, size), range(size // 2))
    return replace(
        layer,
        tensors={name: pick(tensor, halves) if name in rows else tensor for name, tensor in layer.tensors.items()},
    )


def _by_input(layer: LayerState) -> bool:
    return layer.tensors["dora_scale"].shape[1] > 1


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
