"""Forms: the few shapes of computation that adapter layers of any type are lowered to, so that they fit into slots."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import PATCH_DELTA, AdapterLayer, TermOf
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.full import FULL
from diffadapt.types.ia3 import IA3
from diffadapt.types.lora import LORA

ROWS = "rows"
"""Key of the form of low-rank changes, which share the rows of one slot."""

_IA3, _IA3_LYCORIS = IA3


class Form(NamedTuple):
    """A part of an adapter layer, in the form in which it runs in a slot.

    Attributes:
        key: forms with the same key fit into the same slots.
        adapter_type: the type whose functions compute this part.
        stages: where this part acts on the host.
        tensors: prepared tensors for the functions of `adapter_type`.
        rows: the number of rows that it takes of a slot: the rank for the key `ROWS`, otherwise 1.
    """

    key: Hashable
    adapter_type: AdapterType
    stages: tuple[Stage, ...]
    tensors: Tensors
    rows: int = 1

    def __str__(self) -> str:
        """Return the description of this form in messages."""
        if self.key == ROWS:
            return f"rank {self.rows}"
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.adapter_type.name} ({shapes})"


Forms: TypeAlias = Mapping[str, Sequence[Form]]
"""Module path -> the forms of the adapter layer there."""


def lower(
    layer: AdapterLayer,
    weight: Callable[[], Tensor],
    device: torch.device | None = None,
    term_of: TermOf | None = None,
) -> list[Form]:
    """Return the forms that together compute what an adapter layer computes.

    Args:
        layer: the adapter layer. One on the meta device yields forms with meta tensors.
        weight: returns the canonical base weight, as in `adapter_type.Surroundings`.
        device: the device to prepare tensors on; defaults to the device of `layer`.
        term_of: see `AdapterLayer.prepare`.
    """
    adapter_type, spec = layer.adapter_type, layer.spec
    if adapter_type is LORA and spec.groups == 1 and len(layer._parameters) == 2:
        # The most common case, kept fast: the two factors are the form.
        factors: Any = layer._parameters
        return [rows_form(factors["lora_down"], factors["lora_up"])]
    if layer.spec.kind == "parameter":
        raise AdapterError(
            f"a bare parameter ({layer.parameter}) has no slots: load the adapter with allow_recompile=True, or "
            "merge it"
        )
    tensors = layer.prepare(weight, device=device, term_of=term_of)
    forms: list[Form] = []
    remaining: list[Stage] = [stage for stage in layer.stages if stage not in ("patch", "gain")]
    if "patch" in layer.stages:
        forms.append(slot_form(adapter_type, ("patch",), {PATCH_DELTA: tensors[PATCH_DELTA]}))
    if "gain" in layer.stages:
        forms.append(gain_form(adapter_type, tensors))
    low_rank = adapter_type.as_low_rank(tensors, spec) if "add" in remaining and spec.groups == 1 else None
    if low_rank is not None:
        remaining.remove("add")
        forms.append(rows_form(*low_rank))
        bias = adapter_type.delta_bias(tensors)
        if bias is not None:
            forms.append(slot_form(FULL, ("add",), {"diff_b": bias}))
    if remaining:
        forms.append(slot_form(adapter_type, tuple(remaining), tensors))
    return forms


def rows_form(down: Tensor, up: Tensor) -> Form:
    """Return the form of a low-rank change with factors `down` (rank, in / groups, *kernel) and `up` (out, rank)."""
    return Form(ROWS, LORA, ("add",), {"lora_down": down, "lora_up": up}, down.shape[0])


def gain_form(adapter_type: AdapterType, tensors: Tensors) -> Form:
    """Return the form of the output scales of a type, from its prepared tensors."""
    gain = adapter_type.gain(tensors)
    gain = gain.to(torch.promote_types(gain.dtype, torch.float32)).unsqueeze(1)
    ia3, content = (_IA3, {"ia3_l": gain + 1}) if adapter_type.gains_bias else (_IA3_LYCORIS, {"ia3_w": gain})
    return slot_form(ia3, ("gain",), content)


def slot_form(adapter_type: AdapterType, stages: tuple[Stage, ...], tensors: Tensors) -> Form:
    """Return a form that takes a whole slot, which must have the same type, stages and shapes."""
    shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items()))
    key = adapter_type.name, adapter_type.twin_of, adapter_type.gains_bias, stages, shapes
    return Form(key, adapter_type, stages, tensors)
