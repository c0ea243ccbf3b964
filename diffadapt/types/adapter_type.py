"""What an adapter type is: a frozen record of pure functions over named tensors.

There is no class hierarchy. A type is one file beside this one that fills in one `AdapterType`; training, inference,
merging, loading and saving are all derived from it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerKind, LayerSpec

Tensors: TypeAlias = Mapping[str, Tensor]
Stage: TypeAlias = Literal["input", "patch", "output", "gain", "add"]
"""Where a type acts on a layer `y = W x + b`, and the function of `AdapterType` that says how.

| stage | change of the weight | function |
|---|---|---|
| "input" | `W T`, on the channels of the input | `apply_map` |
| "patch" | `W T`, on the channels of a convolution's whole patch, `in x kernel` | `apply_map` |
| "output" | `T W` | `apply_map` |
| "gain" | `diag(s) W` | `gain` |
| "add" | `W + D` | `delta_weight`, `delta_output`, `delta_bias` |
"""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a type may know of its layer besides its own tensors.

    Attributes:
        settings: the numbers of the type that are not tensors; `AdapterType.settings` has the defaults.
        scale: `alpha / rank`.
        weight: returns the base weight, canonical and decoded, in float32 (float64 if the layer has that).
    """

    settings: Mapping[str, float]
    scale: float
    weight: Callable[[], Tensor]


class Init(Protocol):
    """Returns the float32 tensors of a new adapter; see `AdapterType.init`."""

    def __call__(
        self, spec: LayerSpec, config: Any, /, *, generator: torch.Generator, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor]: ...


class DeltaOutput(Protocol):
    """Adds the change of a layer's output; see `AdapterType.delta_output`."""

    def __call__(
        self, tensors: Tensors, spec: LayerSpec, /, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor: ...


class ApplyMap(Protocol):
    """Adds the change that a map makes to vectors; see `AdapterType.apply_map`."""

    def __call__(
        self,
        tensors: Tensors,
        spec: LayerSpec,
        /,
        *,
        vectors: Tensor,
        axis: int,
        gate: Tensor,
        transposed: bool = False,
        onto: Tensor | None = None,
    ) -> Tensor: ...


def _unprepared(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    return tensors


def _any_layer(tensors: Tensors) -> LayerSpec:
    raise AdapterError("only a model can tell whether these tensors fit")


def _no_rank(tensors: Tensors) -> int | None:
    return None


def _adds(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    return ("add",)


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("this type does not act there")


@dataclass(frozen=True, kw_only=True)
class AdapterType:
    """One adapter type. Fields without a default are those that every type has.

    "Fitted" tensors are what `fit` or `init` returned, "prepared" tensors what `prepare` made of them. Functions take
    tensors by name and the geometry of the layer first.

    Identity: what the type is called, and how its files are told from others.

    Attributes:
        name: the name in reports ("lora").
        tensors: every tensor name that a layer of this type may own; files spell them so unless `formats/` knows more.
        identified_by: a layer with any of these tensors is of this type, if `claims` agrees.
        claims: whether tensors with such names are of this type, where names alone do not tell.
        config: the settings class of new adapters of this type; `selects` decides where several types share one.
        layers: the kinds of layers that it can sit on.
        settings: numbers that a file's metadata may give, with their defaults.
        marks: the settings that are 1 where a file has a tensor of their name, whatever its value.
        alpha_is: the setting that an alpha in a file means, where that is not `alpha / rank`.

    Formula: what the type does to a layer. Everything at run time and in merging is derived from it.

    Attributes:
        fit: turns the tensors of a file into the shapes that the formulas use for this layer. Raises `AdapterError`
            with what was expected and found if they cannot belong to the layer.
        geometry: the layer that the tensors of a file fit, for when there is no model to ask. Raises `AdapterError` if
            the tensors say too little.
        rank: the rank by the shapes of the tensors; `None` where alpha does not apply to the type.
        stages: where the type acts, from its fitted tensors.
        prepare: computes the part of the formula that does not depend on the input, as named tensors, which all
            functions below take. It runs anew under autograd; in inference its result is kept until something changes.
        delta_weight: the canonical change of the weight at scale 1, in the dtype of the tensors.
        delta_output: `onto + gate * op(input, delta_weight)`, plus the change of the bias, at the cost of the factors.
            `gate` is a 0-d float32 tensor; `onto` may be overwritten when gradients are disabled.
        delta_bias: the change of the bias at scale 1, or `None`; most types have none.
        as_low_rank: `down` (rank, in / groups, *kernel) and `up` (out, rank) with the same `delta_weight`, or `None`
            where that saves nothing; see `LayerSpec.low_rank`.
        apply_map: `onto + gate * (T - 1) vectors` along an axis of `vectors`, or the same with `T` transposed, as a
            new tensor. `gate` is a 0-d float32 tensor.
        gain: `s - 1`, of shape (out,).
        gains_bias: whether `s` multiplies the bias too.
        orthogonal: whether `T` is a rotation, whose inverse is its transpose.

    Surgery: how a layer's tensors are cut or widened.

    Attributes:
        rows: the tensors of a layer that has only the given rows of the weight, in this order; `None` if the fitted
            tensors cannot be cut so. A sum then becomes a LoRA or a whole change, anything else is refused.
        columns: tensor -> its axis of the inputs of a linear layer. With zeros appended along these axes the tensors
            fit a layer with more inputs and ignore the additional ones.

    Training: how a new adapter starts, and what dropout means for it.

    Attributes:
        init: returns the float32 tensors of an adapter that changes nothing yet or, if `config.init` is false, of a
            random one. `weight()` is the base weight, as in `Surroundings`. Raises `AdapterError` for settings that the
            layer does not allow.
        masked: tensor -> the axis along which rank dropout zeroes slices.
        blocks: prepared tensor -> the axis along which dropout zeroes slices, for types whose dropout works on blocks
            (a rotation becomes the identity there). Other types drop elements of the input.
    """

    # Identity
    name: str
    tensors: tuple[str, ...]
    identified_by: frozenset[str]
    claims: Callable[[Tensors], bool] = lambda tensors: True
    config: type[AdapterConfig]
    selects: Callable[[Any], bool] = lambda config: True
    layers: frozenset[LayerKind] = frozenset({"linear", "conv", "embedding"})
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    marks: frozenset[str] = frozenset()
    alpha_is: str | None = None

    # Formula
    fit: Callable[[Tensors, LayerSpec], dict[str, Tensor]]
    geometry: Callable[[Tensors], LayerSpec] = _any_layer
    rank: Callable[[Tensors], int | None] = _no_rank
    stages: Callable[[Tensors, LayerSpec], tuple[Stage, ...]] = _adds
    prepare: Callable[[Tensors, LayerSpec, Surroundings], Tensors] = _unprepared
    delta_weight: Callable[[Tensors, LayerSpec], Tensor] = _missing
    delta_output: DeltaOutput = _missing
    delta_bias: Callable[[Tensors], Tensor | None] = lambda tensors: None
    as_low_rank: Callable[[Tensors, LayerSpec], tuple[Tensor, Tensor] | None] = lambda tensors, spec: None
    apply_map: ApplyMap = _missing
    gain: Callable[[Tensors], Tensor] = _missing
    gains_bias: bool = False
    orthogonal: bool = False

    # Surgery
    rows: Callable[[Tensors, LayerSpec, Sequence[range]], dict[str, Tensor] | None] = lambda tensors, spec, rows: None
    columns: Mapping[str, int] = field(default_factory=dict[str, int])

    # Training
    init: Init
    masked: Mapping[str, int] = field(default_factory=dict[str, int])
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` does anything."""
        return self.prepare is not _unprepared
