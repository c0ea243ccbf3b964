"""GLoRA: `W' = W + scale * (b1 @ b2 + W @ a1 @ a2)`, a low-rank change plus a low-rank map of the inputs of W.

Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", arXiv 2306.07967, with the terms
that LyCORIS has: KohakuBlueleaf/LyCORIS f49d30d `lycoris/modules/glora.py`. In convolutions, a1 and a2 act on the
channels.

| tensor | here, and in LyCORIS since 2.0 | in LyCORIS before 2.0 |
|---|---|---|
| `glora_a1` | (in, rank) | (rank, in), applied first |
| `glora_a2` | (rank, in) | (in, rank) |
| `glora_b1` | (out, rank) | (rank, in, *kernel), applied first |
| `glora_b2` | (rank, in, *kernel) | (out, rank) |
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import along, scaled, shape_of, take_rows

_NAMES = ("glora_a1", "glora_a2", "glora_b1", "glora_b2")
_OLD_NAMES = ("glora_a2", "glora_a1", "glora_b2", "glora_b1")


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(RankedConfig):
    """Settings of a new GLoRA (Chavan et al., arXiv 2306.07967). Dropout acts on the input of `b2`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise AdapterError("use_dora: there is no DoRA of GLoRA")


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file, in either layout, and return them in the shapes of the table above."""
    missing = [name for name in _NAMES if name not in tensors]
    if missing:
        raise AdapterError(f"{', '.join(missing)} missing, only {', '.join(sorted(tensors))} found")
    _refuse(spec)
    shapes = {name: shape_of(tensors[name]) for name in _NAMES}
    for sources in (_NAMES, _OLD_NAMES):
        expected = _shapes(spec, next(iter(shapes[sources[1]]), 0))
        if all(_fits(shapes[source], expected[name]) for name, source in zip(_NAMES, sources, strict=True)):
            return {name: tensors[source].reshape(expected[name]) for name, source in zip(_NAMES, sources, strict=True)}
    found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise AdapterError(f"factors {found}, expected those of one rank for a weight of shape {spec.weight_shape}")


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a layer that the tensors fit, in the layout in which their rank is lower."""
    if any(name not in tensors or tensors[name].ndim < 2 for name in _NAMES):
        return LayerSpec("linear", 0, 0)
    a1, _, up, down = (tensors[name] for name in _NAMES)
    if a1.shape[0] < a1.shape[1]:
        up, down = down, up
    return plain_spec(up.shape[0], down.shape[1], tuple(down.shape[2:]))


def init(
    spec: LayerSpec, config: GLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return Kaiming-uniform `a1` and `b1`, and zero `a2` and `b2`, as in LyCORIS."""
    _refuse(spec)
    tensors = {name: torch.zeros(shape) for name, shape in _shapes(spec, config.rank).items()}
    for name in _NAMES if not config.init else ("glora_a1", "glora_b1"):
        bound = 1 / math.sqrt(tensors[name][0].numel())
        tensors[name].uniform_(-bound, bound, generator=generator)
    return tensors


def rank(tensors: Tensors) -> int:
    """Return the rank of both products."""
    return tensors["glora_b2"].shape[0]


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return `b1 @ b2` in the canonical weight shape. `apply_map` computes the other term."""
    return spec.product(tensors["glora_b2"], tensors["glora_b1"])


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto + b1(gate * b2(input))`."""
    return spec.low_rank(input, tensors["glora_b2"], tensors["glora_b1"], gate, onto)


def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `b2` as `down` and `b1` as `up`."""
    return tensors["glora_b2"], tensors["glora_b1"]


def rows(tensors: Tensors, spec: LayerSpec, rows: Sequence[range]) -> dict[str, Tensor]:
    """Return the tensors with the given rows of `b1`. The map of the inputs is the same for all rows."""
    return {**tensors, "glora_b1": take_rows(tensors["glora_b1"], rows)}


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
    """Return `onto + gate * a1 @ a2 @ vectors` along an axis, or the same with `a1 @ a2` transposed."""
    up, down = tensors["glora_a1"], tensors["glora_a2"]
    if transposed:
        up, down = down.t(), up.t()
    product = along(scaled(along(vectors, down, axis), gate), up, axis)
    return product if onto is None else onto + product


def _shapes(spec: LayerSpec, rank: int) -> dict[str, tuple[int, ...]]:
    return {
        "glora_a1": (spec.in_features, rank),
        "glora_a2": (rank, spec.in_features),
        "glora_b1": (spec.out_features, rank),
        "glora_b2": (rank, spec.in_features, *spec.kernel),
    }


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Return whether a shape is the expected one, with or without the sizes of a 1 x 1 kernel."""
    same_kernel = shape[2:] == expected[2:] or {1}.issuperset(shape[2:] + expected[2:])
    return shape[:2] == expected[:2] and same_kernel and 0 not in shape


def _refuse(spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; GLoRA's map of the inputs would mix them")
    if spec.kind == "embedding":
        raise AdapterError("an embedding has no inputs that GLoRA could map; exclude it")


GLORA = AdapterType(
    name="glora",
    tensors=_NAMES,
    identified_by=frozenset(_NAMES),
    config=GLoRAConfig,
    fit=fit,
    init=init,
    rank=rank,
    geometry=geometry,
    stages=lambda tensors, spec: ("input", "add"),
    delta_weight=delta_weight,
    delta_output=delta_output,
    as_low_rank=as_low_rank,
    rows=rows,
    apply_map=apply_map,
    masked={"glora_a1": 1, "glora_b1": 1},
)
