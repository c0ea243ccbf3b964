"""What an adapter type is: a frozen record of pure functions over named tensors.

There is no class hierarchy. A type is one file in `types/` that fills in one `AdapterType`; training, inference,
merging, loading and saving are all derived from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from diffadapt.config import AdapterConfig
from diffadapt.errors import AdapterError
from diffadapt.layer import LayerKind, LayerSpec

Tensors: TypeAlias = Mapping[str, Tensor]
Stage: TypeAlias = Literal["input", "patch", "output", "gain", "add"]
"""Where a type acts on a layer `y = W x + b`, and the function of `AdapterType` that says how.

| stage | change of the weight | function |
|---|---|---|
| "input" | `W T`, on the input's channels | `turn` |
| "patch" | `W T`, on the channels of a convolution's whole patch, `in x kernel` | `turn` |
| "output" | `T W` | `turn` |
| "gain" | `diag(s) W` | `gain` |
| "add" | `W + D` | `delta_weight`, `delta_output`, `delta_bias` |
"""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a type may know of the layer beside its own tensors.

    Attributes:
        settings: numbers that belong to the type and are no tensors (`AdapterType.settings` has the defaults).
        scale: `alpha / rank`.
        weight: gives the base weight, canonical and decoded, in float32 (float64 if the layer has that).
    """

    settings: Mapping[str, float]
    scale: float
    weight: Callable[[], Tensor]


def _as_they_are(tensors: Tensors, layer: LayerSpec, surroundings: Surroundings) -> Tensors:
    return tensors


def _any_layer(tensors: Tensors) -> LayerSpec:
    raise AdapterError("only a model can tell whether these tensors fit")


def _no_rank(tensors: Tensors) -> int | None:
    return None


def _adds(tensors: Tensors, layer: LayerSpec) -> tuple[Stage, ...]:
    return ("add",)


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("this type does not act there")


@dataclass(frozen=True)
class AdapterType:
    """One adapter type. Fields without a default are what every type has.

    Attributes:
        name: as in reports ("lora").
        tensors: every tensor name a layer of this type may own; files spell them so unless `formats/` knows more.
        identified_by: any of these present means this type, if `claims` agrees.
        config: the settings class that `add_adapter` makes adapters of this type from; `selects` narrows it down
            where types share one.
        fit: tensors as a file has them -> tensors in the shapes the formulas use, for this layer. Raises
            `AdapterError` with expected and found where they cannot belong to the layer.
        init: `(layer, config, generator, weight)` -> float32 tensors of an adapter that changes nothing yet, or, with
            `config.init` false, a random one. `weight()` is the base weight, as in `Surroundings`. Raises
            `AdapterError` for settings that the layer does not allow.
        claims: whether tensors with such names are of this type, where names alone do not tell.
        rank: from the shapes; `None` where alpha does not apply to the type.
        geometry: a layer that tensors as a file has them fit on, for when there is no model to ask. Raises
            `AdapterError` where they say too little.
        stages: where the type acts, from its tensors.
        prepare: what of the formula does not depend on the input, as named tensors; all functions below take its
            result. Computed anew under autograd, kept in inference until something changes.
        delta_weight: canonical weight change at scale 1, in the dtype of the tensors.
        delta_output: `onto + gate * op(input, delta_weight)`, plus the bias change, at the cost of the factors.
            Arguments: tensors, layer, input, gate (0-d float32), onto (may be overwritten without autograd).
        delta_bias: bias change at scale 1, or `None`; most types have none.
        as_low_rank: `down` (rank, in / groups, *kernel) and `up` (out, rank) with the same `delta_weight`, or `None`
            where that is no saving; see `LayerSpec.low_rank`.
        rows: tensors of the layer that has only these rows of the weight, in this order, or `None` where the tensors
            cannot be taken apart so (a sum then becomes a LoRA or a whole change, anything else is refused).
            Arguments: fitted tensors, layer, ranges of rows.
        columns: tensor -> its axis of the inputs of a linear layer. With zeros added along these axes the tensors fit a
            layer with more inputs, and do nothing with them.
        turn: `onto + gate * (T - 1) vectors` along an axis of `vectors`, or of `T` transposed, as a new tensor.
            Arguments: tensors, layer, vectors, axis, gate (0-d float32), transposed, onto (or `None`).
        gain: `s - 1`, of shape (out,).
        gains_bias: whether `s` multiplies the bias too.
        settings: numbers that a file's metadata may give, with their defaults.
        marks: of these settings, those that are 1 where a file has a tensor of their name beside the type's, whatever
            is in it.
        alpha_is: the setting that an alpha in a file means, where it is not `alpha / rank`.
        layers: kinds of layers it can sit on.
        masked: tensor -> axis along which rank dropout zeroes slices.
        blocks: prepared tensor -> axis along which dropout zeroes slices, where that is what dropout means (a
            rotation becomes the identity there); types without it drop elements of the input.
    """

    name: str
    tensors: tuple[str, ...]
    identified_by: frozenset[str]
    config: type[AdapterConfig]
    fit: Callable[[Tensors, LayerSpec], dict[str, Tensor]]
    init: Callable[[LayerSpec, Any, torch.Generator, Callable[[], Tensor]], dict[str, Tensor]]
    claims: Callable[[Tensors], bool] = lambda tensors: True
    selects: Callable[[Any], bool] = lambda config: True
    rank: Callable[[Tensors], int | None] = _no_rank
    geometry: Callable[[Tensors], LayerSpec] = _any_layer
    stages: Callable[[Tensors, LayerSpec], tuple[Stage, ...]] = _adds
    prepare: Callable[[Tensors, LayerSpec, Surroundings], Tensors] = _as_they_are
    delta_weight: Callable[[Tensors, LayerSpec], Tensor] = _missing
    delta_output: Callable[[Tensors, LayerSpec, Tensor, Tensor, Tensor | None], Tensor] = _missing
    delta_bias: Callable[[Tensors], Tensor | None] = lambda tensors: None
    as_low_rank: Callable[[Tensors, LayerSpec], tuple[Tensor, Tensor] | None] = lambda tensors, layer: None
    rows: Callable[[Tensors, LayerSpec, Sequence[range]], dict[str, Tensor] | None] = lambda tensors, layer, rows: None
    columns: Mapping[str, int] = field(default_factory=dict[str, int])
    turn: Callable[[Tensors, LayerSpec, Tensor, int, Tensor, bool, Tensor | None], Tensor] = _missing
    gain: Callable[[Tensors], Tensor] = _missing
    gains_bias: bool = False
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    marks: frozenset[str] = frozenset()
    alpha_is: str | None = None
    layers: frozenset[LayerKind] = frozenset({"linear", "conv", "embedding"})
    masked: Mapping[str, int] = field(default_factory=dict[str, int])
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` does anything."""
        return self.prepare is not _as_they_are
