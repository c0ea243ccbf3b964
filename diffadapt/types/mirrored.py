"""Adapter types on a layer that shares its weight with another one and stores it in the other orientation.

An embedding looks up the rows of a weight `(vocabulary, width)`, and the output layer of a language model multiplies by
the same weight: the canonical weight of one is the transpose of that of the other. An adapter on the first layer, the
primary one, is an adapter on its twin, with the formula transposed:

| primary layer | twin |
|---|---|
| `W + D` | `W^T + D^T` |
| `W R` | `R^T W^T`, an output map |
| `Q W` | `W^T Q^T`, an input map |
| `diag(s) W` | `W^T diag(s)`, an input map |

Both use the same tensors. Types whose tensors have the orientation in which layers store their weight
(`AdapterType.is_stored`) need nothing transposed.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types import named
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import scaled


def on_twin(adapter_type: AdapterType, primary: LayerSpec, twin: LayerSpec, tensors: Tensors) -> AdapterType:
    """Return the type of an adapter layer on a twin of a layer, which uses the same tensors.

    Args:
        adapter_type: the type of the adapter layer on the primary layer.
        primary: the geometry of the primary layer.
        twin: the geometry of the twin.
        tensors: the fitted tensors.

    Raises:
        AdapterError: a twin cannot have such an adapter.
    """
    if adapter_type.delta_bias(tensors) is not None:
        raise AdapterError("tied layers share a weight and no bias: set bias=False, or ensure_weight_tying=False")
    if adapter_type.is_stored or primary.transposed == twin.transposed:
        return adapter_type
    stages = adapter_type.stages(tensors, primary)
    if adapter_type.joint(tensors) or "patch" in stages or {"output", "gain"} <= set(stages):
        raise AdapterError(f"a {adapter_type.name} cannot be shared by tied layers; use ensure_weight_tying=False")
    if twin.kind == "embedding" and not {"output", "gain"}.isdisjoint(stages):
        raise AdapterError(
            f"a {adapter_type.name} on the output layer would map the ids that the embedding reads; name the embedding"
        )
    return mirrored(adapter_type.name, primary)


@cache
def mirrored(name: str, primary: LayerSpec) -> AdapterType:
    """Return adapter type `name` on a twin of a layer with geometry `primary`; see the table above."""
    base = named(name)
    moved: dict[Stage, Stage] = {"input": "output", "output": "input", "gain": "input", "add": "add"}

    def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
        return tuple(dict.fromkeys(moved[stage] for stage in base.stages(tensors, primary)))

    def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
        return base.prepare(tensors, primary, replace(surroundings, weight=lambda: surroundings.weight().t()))

    def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
        return base.delta_weight(tensors, primary).t()

    def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
        factors = base.as_low_rank(tensors, primary)
        return None if factors is None else (factors[1].t(), factors[0].t())

    def delta_output(
        tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        factors = as_low_rank(tensors, spec)
        if factors is not None:
            return spec.low_rank(input, *factors, gate, onto)
        return spec.dense(input, delta_weight(tensors, spec), gate, onto)

    def apply_map(
        tensors: Tensors,
        spec: LayerSpec,
        *,
        vectors: Tensor,
        axis: int,
        gate: Tensor,
        transposed: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor:
        if "gain" not in base.stages(tensors, primary):
            options: Any = {"vectors": vectors, "axis": axis, "gate": gate, "onto": onto}
            return base.apply_map(tensors, primary, transposed=not transposed, **options)
        gain = base.gain(tensors)
        shape = [1] * vectors.ndim
        shape[axis] = -1
        change = scaled(vectors * gain.view(shape).to(vectors.dtype), gate)
        return change if onto is None else onto + change

    functions: dict[str, Callable[..., Any]] = {
        "stages": stages,
        "delta_weight": delta_weight,
        "as_low_rank": as_low_rank,
        "delta_output": delta_output,
        "apply_map": apply_map,
        # A type may add its change to the weight in one orientation only.
        "in_weight": lambda tensors, spec: False,
        **({"prepare": prepare} if base.is_prepared else {}),
    }
    return replace(base, twin_of=primary, delta_bias=lambda tensors: None, gains_bias=False, columns={}, **functions)
