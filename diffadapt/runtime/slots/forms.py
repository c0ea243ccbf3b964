"""The forms that adapter layers of any type are lowered to, so that they fit into slots."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffadapt.runtime.adapter_layer import PATCH_DELTA, AdapterLayer
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors
from diffadapt.types.full import FULL
from diffadapt.types.ia3 import IA3
from diffadapt.types.lora import LORA

ROWS = "rows"
_IA3, _IA3_LYCORIS = IA3


class Form(NamedTuple):
    """A part of an adapter layer as it runs.

    Attributes:
        key: what has the same key has room in the same slots.
        tensors: what the functions of `adapter_type` take, prepared.
        rows: how much it takes of a slot: its rank in the form "rows", else 1.
    """

    key: Hashable
    adapter_type: AdapterType
    stages: tuple[Stage, ...]
    tensors: Tensors
    rows: int = 1

    def __str__(self) -> str:
        if self.key == ROWS:
            return f"rank {self.rows}"
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.adapter_type.name} ({shapes})"


Forms: TypeAlias = Mapping[str, Sequence[Form]]
"""Module path -> what `lower` made of the adapter layer there."""


def lower(layer: AdapterLayer, weight: Callable[[], Tensor], device: torch.device | None = None) -> list[Form]:
    """The forms an adapter layer consists of; together they compute what the layer does.

    Args:
        weight: gives the base weight, as in `adapter_type.Surroundings`. Meta tensors give meta tensors.
        device: where to compute what has to be computed; default where the adapter layer is.
    """
    adapter_type, spec = layer.adapter_type, layer.spec
    if adapter_type is LORA and spec.groups == 1 and len(layer._parameters) == 2:
        # The usual case, without the detours: two factors are what is wanted.
        factors: Any = layer._parameters
        return [rows_form(factors["lora_down"], factors["lora_up"])]
    tensors = layer.prepared(weight, device=device)
    forms: list[Form] = []
    rest: list[Stage] = [stage for stage in layer.stages if stage not in ("patch", "gain")]
    if "patch" in layer.stages:
        forms.append(_whole(adapter_type, ("patch",), {PATCH_DELTA: tensors[PATCH_DELTA]}))
    if "gain" in layer.stages:
        gain = adapter_type.gain(tensors)
        gain = gain.to(torch.promote_types(gain.dtype, torch.float32)).unsqueeze(1)
        like, factors = (_IA3, {"ia3_l": gain + 1}) if adapter_type.gains_bias else (_IA3_LYCORIS, {"ia3_w": gain})
        forms.append(_whole(like, ("gain",), factors))
    low_rank = adapter_type.as_low_rank(tensors, spec) if "add" in rest and spec.groups == 1 else None
    if low_rank is not None:
        rest.remove("add")
        forms.append(rows_form(*low_rank))
        bias = adapter_type.delta_bias(tensors)
        if bias is not None:
            forms.append(_whole(FULL, ("add",), {"diff_b": bias}))
    if rest:
        forms.append(_whole(adapter_type, tuple(rest), tensors))
    return forms


def rows_form(down: Tensor, up: Tensor) -> Form:
    return Form(ROWS, LORA, ("add",), {"lora_down": down, "lora_up": up}, down.shape[0])


def _whole(adapter_type: AdapterType, stages: tuple[Stage, ...], tensors: Tensors) -> Form:
    shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items()))
    return Form((adapter_type.name, adapter_type.gains_bias, stages, shapes), adapter_type, stages, tensors)
