"""Common forms: an adapter layer in shapes that follow from its host alone, so that a slot fits any layer of its type.

The form of its own that a type has in a slot (`forms.lower`) depends on its settings: the blocks of an OFT, the factors
of a LoKr. The common forms are the matrices that these stand for. They are exact, and as large as a weight:

| stage | content of a slot | size |
|---|---|---|
| add | the change of the weight, D | that of the weight |
| input, patch | what the map makes of the original weight, `W (R - I)` | that of the weight |
| output | `Q - I` | outputs x outputs |
| gain | a factor per output | outputs |
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter_layer import PATCH_DELTA, AdapterLayer, TermOf
from diffadapt.runtime.slots.forms import Form, gain_form, slot_form
from diffadapt.types.adapter_type import AdapterType, Stage, Tensors, refuse_weightless
from diffadapt.types.config import AdapterConfig
from diffadapt.types.full import FULL
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import scaled

_MATRIX = "matrix"


def _apply_matrix(
    tensors: Tensors,
    spec: LayerSpec,
    *,
    vectors: Tensor,
    axis: int,
    gate: Tensor,
    transposed: bool = False,
    onto: Tensor | None = None,
) -> Tensor:
    """Return `onto + gate * M vectors`, where M is the stored matrix, `T - 1`."""
    matrix = tensors[_MATRIX]
    change = vectors.movedim(axis, -1) @ (matrix if transposed else matrix.mT)
    change = scaled(change, gate).movedim(-1, axis)
    return change if onto is None else onto + change


def _never(*_: Any, **__: Any) -> Any:
    raise AdapterError("the matrix of a map is no adapter of its own")


_MAP = AdapterType(
    name="map",
    tensors=(_MATRIX,),
    identified_by=frozenset(),
    config=AdapterConfig,
    fit=_never,
    init=_never,
    apply_map=_apply_matrix,
)
_MAPS = {False: _MAP, True: replace(_MAP, gains_bias=True)}


def lower_in_common(
    layer: AdapterLayer,
    weight: Callable[[], Tensor],
    device: torch.device | None = None,
    term_of: TermOf | None = None,
) -> list[Form]:
    """Return the common forms that together compute what an adapter layer computes.

    They are computed in the dtype of the original weight and rounded once.

    Args:
        layer: the adapter layer. One on the meta device yields forms with meta tensors.
        weight, device, term_of: see `forms.lower`.
    """
    adapter_type, spec, base = layer.adapter_type, layer.spec, weight()
    refuse_weightless(adapter_type, layer.tensors)
    base = base if device is None else base.to(device)
    tensors = layer.prepare(lambda: base, base.dtype, device, term_of=term_of)
    forms: list[Form] = []

    def add(kind: AdapterType, stage: Stage, name: str, content: Tensor) -> None:
        forms.append(slot_form(kind, (stage,), {name: content.to(layer.dtype)}))

    one = torch.ones((), dtype=torch.float32, device=base.device)
    if "patch" in layer.stages:
        add(FULL, "patch", PATCH_DELTA, tensors[PATCH_DELTA])
    elif "input" in layer.stages:
        delta = adapter_type.apply_map(tensors, spec, vectors=base, axis=1, gate=one, transposed=True)
        add(FULL, "patch", PATCH_DELTA, delta)
    if "output" in layer.stages:
        identity = torch.eye(spec.out_features, dtype=base.dtype, device=base.device)
        matrix = adapter_type.apply_map(tensors, spec, vectors=identity, axis=0, gate=one)
        add(_MAPS[adapter_type.gains_bias], "output", _MATRIX, matrix)
    if "gain" in layer.stages:
        forms.append(gain_form(adapter_type, tensors))
    if "add" in layer.stages:
        add(FULL, "add", "diff", spec.to_stored(adapter_type.delta_weight(tensors, spec)))
        bias = adapter_type.delta_bias(tensors)
        if bias is not None:
            add(FULL, "add", "diff_b", bias)
    return forms


def common_needs(adapter_type: AdapterType, spec: LayerSpec, dtype: torch.dtype) -> list[Form]:
    """Return examples of the common forms that adapter layers of a type may have on a layer, without values.

    An output map is not among them, since it is as large again and most adapters have none.
    """
    if spec.kind not in adapter_type.layers:
        return []
    forms: list[Form] = []
    weight = torch.empty(spec.weight_shape, dtype=dtype, device="meta")
    if has(adapter_type, "delta_weight"):
        forms.append(slot_form(FULL, ("add",), {"diff": spec.to_stored(weight)}))
    if has(adapter_type, "apply_map") and spec.kind in ("linear", "conv") and spec.groups == 1:
        forms.append(slot_form(FULL, ("patch",), {PATCH_DELTA: weight}))
    if has(adapter_type, "gain"):
        gain = torch.empty(spec.out_features, dtype=torch.promote_types(dtype, torch.float32), device="meta")
        forms.append(gain_form(replace(adapter_type, gain=lambda tensors: gain), {}))
    return forms


def has(adapter_type: AdapterType, function: str) -> bool:
    """Return whether a type has a function that not all types have."""
    return getattr(adapter_type, function) is not AdapterType.__dataclass_fields__[function].default


def bytes_in_common(adapter_type: AdapterType, spec: LayerSpec, dtype: torch.dtype) -> int:
    """Return the size of the common forms of a type on a layer."""
    return sum(
        t.numel() * t.element_size() for form in common_needs(adapter_type, spec, dtype) for t in form.tensors.values()
    )
