"""The definition of an adapter type: a frozen record of pure functions over named tensors.

There is no class hierarchy. Each adapter type is a module of this package that fills in an `AdapterType`. Training,
inference, merging, loading and saving are all derived from that record.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.config import AdapterConfig
from diffadapt.types.layer_spec import LayerKind, LayerSpec
from diffadapt.types.layer_state import LayerState

Tensors: TypeAlias = Mapping[str, Tensor]
Stage: TypeAlias = Literal["input", "patch", "output", "gain", "add", "parameter"]
"""Where a type acts on a layer `y = W x + b`. One or more functions of `AdapterType` define the change at each stage.

| stage | changed weight | function |
|---|---|---|
| "input" | `W T`, where T maps the channels of the input | `apply_map` |
| "patch" | `W T`, where T maps the `in x kernel` channels of a convolution's whole patch | `apply_map` |
| "output" | `T W` | `apply_map` |
| "gain" | `diag(s) W` | `gain` |
| "add" | `W + D` | `delta_weight`, `delta_output`, `delta_bias` |
| "parameter" | `P + D`, which the module that owns the parameter P sees | `delta_weight` |
"""


MOST_NOISE = 1000
"""The timestep of pure noise. Timesteps are counted from 0 (no noise) up to it, whatever a model is called with."""

UNTIL = "acts_until"
"""Name of a tensor with the last timestep, see `MOST_NOISE`, at which every component of a rank acts, in int32.

An adapter layer with such a prepared tensor has a gate for every component in every call.
"""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The data that `AdapterType.prepare` may use besides the tensors of the adapter layer.

    Attributes:
        settings: the adapter layer's numbers that are not tensors; see `AdapterType.settings`.
        scale: `alpha / rank`.
        weight: function that returns the base weight, canonical and decoded, in float32 (float64 if the layer's weight
            is float64).
        bias: function that returns the base bias, or `None` if the layer has none.
        others: function that returns the sum of `AdapterType.joint_term` over the other parts of the same layer of a
            file; `None` if there are none.
    """

    settings: Mapping[str, float]
    scale: float
    weight: Callable[[], Tensor]
    others: Callable[[], Tensor] | None = None
    bias: Callable[[], Tensor | None] = lambda: None


class Unfinished(NamedTuple):
    """One layer of an adapter for `AdapterType.complete`.

    Attributes:
        tensors: the fitted tensors that are known so far.
        spec: the geometry of the layer.
        settings, weight, bias: see `Surroundings`.
    """

    tensors: Tensors
    spec: LayerSpec
    settings: Mapping[str, float]
    weight: Callable[[], Tensor]
    bias: Callable[[], Tensor | None] = lambda: None


class Init(Protocol):
    """The signature of `AdapterType.init`."""

    def __call__(
        self, spec: LayerSpec, config: Any, /, *, generator: torch.Generator, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor]: ...


class DeltaOutput(Protocol):
    """The signature of `AdapterType.delta_output`."""

    def __call__(
        self, tensors: Tensors, spec: LayerSpec, /, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor: ...


class ApplyMap(Protocol):
    """The signature of `AdapterType.apply_map`."""

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


def _complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    return {path: layer.tensors for path, layer in layers.items()}


def _any_layer(tensors: Tensors) -> LayerSpec:
    raise AdapterError("only a model can tell whether these tensors fit")


def _as_they_are(
    tensors: Tensors, spec: LayerSpec, settings: Mapping[str, float]
) -> tuple[Tensors, Mapping[str, float]]:
    return tensors, settings


def _no_rank(tensors: Tensors) -> int | None:
    return None


def _adds(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    return ("add",)


def refuse_weightless(adapter_type: "AdapterType", tensors: Tensors) -> None:
    """Raise `AdapterError` if the change of an adapter layer is that of no weight; see `AdapterType.weightless`."""
    reason = adapter_type.weightless(tensors)
    if reason is not None:
        raise AdapterError(f"a {adapter_type.name} like this cannot be merged or converted: {reason}")


def _onto_weight(
    adapter_type: "AdapterType", tensors: Tensors, spec: LayerSpec, weight: Tensor, gate: Tensor
) -> Tensor:
    return torch.addcmul(weight, adapter_type.delta_weight(tensors, spec).to(weight), gate)


def _never(tensors: Tensors, spec: LayerSpec) -> bool:
    return False


def _missing(*_: Any, **__: Any) -> Any:
    raise NotImplementedError("this adapter type does not act at this stage")


@dataclass(frozen=True, kw_only=True)
class AdapterType:
    """One adapter type. Every type has to provide the fields without a default.

    "Fitted" tensors are those that `fit` or `init` returned; "prepared" tensors are those that `prepare` computed from
    them. The first arguments of a function are the tensors by name and the geometry of the layer.

    Identity: the name of the type, and how its files are recognised.

    Attributes:
        name: the name in reports ("lora").
        tensors: every tensor name that an adapter layer of this type may have. Files use the same names, apart from
            the other spellings that `formats/` knows.
        identified_by: tensor names, any one of which identifies the type if `claims` agrees.
        claims: returns whether tensors with such names are of this type, for names that several types share.
        additive: the additive type that this one extends by further tensors; `None` for a type of its own.
        config: the settings class of new adapters of this type.
        selects: returns whether the given settings mean this type, for settings classes that several types share.
        layers: the kinds of layer that this type supports.
        settings: numbers that are not tensors and that a file's metadata may give, with their defaults.
        marks: settings that are 1 if a file has a tensor of that name, whatever the tensor's value.
        alpha_is: the setting that the alpha of a file stands for, if it does not stand for `alpha / rank`.
        unlimited: `(tensors, spec, settings) -> (tensors, settings)` with the same change, where no setting limits all
            rows of the weight together, so that `rows` may cut the tensors.
        stored_as: returns the content that files have for an adapter layer, for types that exist in training only.

    Formula: what the type does to a layer. Run time and merging are both derived from it.

    Attributes:
        fit: checks the tensors of a file and returns them in the shapes that the formulas use for this layer. Raises
            `AdapterError` with the expected and the found shapes if the tensors cannot belong to the layer.
        geometry: returns the spec of a layer that the tensors of a file fit, for use without a model. Raises
            `AdapterError` if the tensors do not determine it.
        fixed: tensors that training does not change, such as random projections. Those of integers (positions) are in
            no other dtype, and a fixed tensor may have one.
        shared: tensors that all layers of an adapter have in common, as one parameter. A PEFT folder has them once.
        complete: returns the tensors of every layer of an adapter, by path, with those added that files may leave out
            because they follow from a seed, from the base weights or from the other layers, in the order of the model.
            Layers without values (on the meta device) get tensors without values.
        rank: returns the rank, read from the shapes of the tensors; `None` if alpha does not apply.
        stages: returns the stages at which the type acts with these fitted tensors.
        prepare: returns the part of the formula that does not depend on the input, as named tensors. All functions
            below take them. Under autograd and in compiled graphs, it runs in every call; in other inference, its
            result is cached until a tensor that it depends on changes.
        reads_weight: whether `prepare` reads the base weight, from the fitted tensors. Such an adapter layer is refused
            at load if the weight cannot be decoded.
        joint: whether `prepare` needs a sum over all parts of a layer that the file has as one and the model as
            several, from the fitted tensors.
        joint_term: returns what one part contributes to that sum.
        weightless: returns why the change is that of no weight, from the fitted tensors: "it depends on the timestep".
            Such an adapter layer is neither merged nor converted. `None`, as for most types, if it is one.
        delta_weight: returns the canonical change of the weight at scale 1, in the dtype of the tensors.
        delta_output: returns `onto + gate * op(input, delta_weight)`, plus the change of the bias, at the cost of the
            factors. `gate` is a 0-d float32 tensor; `onto` may be overwritten when gradients are disabled.
        in_weight: whether the change has no cheaper form than a matrix, from the fitted tensors, so that a layer with
            many tokens had better compute with a changed copy of its weight.
        onto_weight: `(the type, prepared tensors, spec, weight, gate) -> weight + gate * delta_weight`, for the
            canonical weight, as a new tensor.
        delta_bias: returns the change of the bias at scale 1; `None`, as for most types, if there is none.
        as_low_rank: returns `down` (rank, in / groups, *kernel) and `up` (out, rank) with the same `delta_weight`, or
            `None` if using them would save nothing; see `LayerSpec.low_rank`.
        apply_map: returns `onto + gate * (T - 1) vectors` along an axis of `vectors`, or the same with `T` transposed,
            as a new tensor. `gate` is a 0-d float32 tensor.
        gain: returns `s - 1`, of shape (out,).
        gains_bias: whether `s`, or `T` at the stage "output", applies to the bias too.
        orthogonal: whether `T` is a rotation, whose inverse is its transpose.
        is_stored: whether the tensors have the orientation in which the layer stores its weight, so that they fit all
            layers that share it.
        twin_of: for a type on a layer that shares the weight of another one, the geometry of that; see `mirrored`.

    Surgery: how an adapter layer's tensors are cut or extended.

    Attributes:
        rows: returns the tensors of an adapter layer for a layer that has only the given rows of the weight, in the
            given order; `None` if the fitted tensors cannot be cut there. An additive change (also that of a type with
            `additive`) is then loaded as factors or as a matrix; any other change is refused.
        columns: tensor -> its axis over the inputs of a linear layer. With zeros appended along that axis, the tensors
            fit a layer with more inputs and ignore the additional ones.

    Training: how a new adapter starts, and what dropout means for it.

    Attributes:
        init: returns the float32 tensors of an adapter that changes nothing yet or, if `config.init` is false, of a
            random one. `weight()` is the base weight, as in `Surroundings`. Raises `AdapterError` for settings that the
            layer does not allow.
        in_training: returns the prepared tensors for a call in training, for types that draw random numbers there.
        masked: tensor -> the axis along which rank dropout zeroes slices.
        blocks: prepared tensor -> the axis along which dropout zeroes slices, for types whose dropout works on blocks
            (a zeroed block of a rotation becomes the identity). For other types, dropout zeroes elements of the input.
    """

    # Identity
    name: str
    tensors: tuple[str, ...]
    identified_by: frozenset[str]
    claims: Callable[[Tensors], bool] = lambda tensors: True
    additive: "AdapterType | None" = None
    config: type[AdapterConfig]
    selects: Callable[[Any], bool] = lambda config: True
    layers: frozenset[LayerKind] = frozenset({"linear", "conv", "embedding"})
    settings: Mapping[str, float] = field(default_factory=dict[str, float])
    marks: frozenset[str] = frozenset()
    alpha_is: str | None = None
    unlimited: Callable[[Tensors, LayerSpec, Mapping[str, float]], tuple[Tensors, Mapping[str, float]]] = _as_they_are
    stored_as: Callable[[LayerState], LayerState] = lambda state: state

    # Formula
    fit: Callable[[Tensors, LayerSpec], dict[str, Tensor]]
    geometry: Callable[[Tensors], LayerSpec] = _any_layer
    fixed: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    complete: Callable[[Mapping[str, Unfinished]], Mapping[str, Tensors]] = _complete
    rank: Callable[[Tensors], int | None] = _no_rank
    stages: Callable[[Tensors, LayerSpec], tuple[Stage, ...]] = _adds
    prepare: Callable[[Tensors, LayerSpec, Surroundings], Tensors] = _unprepared
    reads_weight: Callable[[Tensors], bool] = lambda tensors: False
    joint: Callable[[Tensors], bool] = lambda tensors: False
    joint_term: Callable[[Tensors, LayerSpec, Surroundings], Tensor] = _missing
    weightless: Callable[[Tensors], str | None] = lambda tensors: None
    delta_weight: Callable[[Tensors, LayerSpec], Tensor] = _missing
    delta_output: DeltaOutput = _missing
    in_weight: Callable[[Tensors, LayerSpec], bool] = _never
    onto_weight: Callable[["AdapterType", Tensors, LayerSpec, Tensor, Tensor], Tensor] = _onto_weight
    delta_bias: Callable[[Tensors], Tensor | None] = lambda tensors: None
    as_low_rank: Callable[[Tensors, LayerSpec], tuple[Tensor, Tensor] | None] = lambda tensors, spec: None
    apply_map: ApplyMap = _missing
    gain: Callable[[Tensors], Tensor] = _missing
    gains_bias: bool = False
    orthogonal: bool = False
    is_stored: bool = False
    twin_of: LayerSpec | None = None

    # Surgery
    rows: Callable[[Tensors, LayerSpec, Sequence[range]], dict[str, Tensor] | None] = lambda tensors, spec, rows: None
    columns: Mapping[str, int] = field(default_factory=dict[str, int])

    # Training
    init: Init
    in_training: Callable[[Tensors], Tensors] = lambda tensors: tensors
    masked: Mapping[str, int] = field(default_factory=dict[str, int])
    blocks: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def is_complete(self) -> bool:
        """Whether an adapter layer needs nothing but what its file or `init` has; see `complete`."""
        return self.complete is _complete

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` does anything."""
        return self.prepare is not _unprepared
