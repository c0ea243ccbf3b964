"""SuperTuning: a sparse change at the largest elements of the weight, and optionally a LoRA next to it.

As in PEFT 0.21.2 `tuners/supertuning/layer.py`. Alpha is for the LoRA alone.

| tensor | shape |
|---|---|
| `supertuning_values` | (n) |
| `supertuning_indices` | (n), positions in the flattened weight, not trained |
| `supertuning_lora_A` | (rank, in / groups x kernel), optional |
| `supertuning_lora_B` | (out, rank), optional |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import checked, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.sparse import is_sparse, scattered, scattered_onto, sparse_product
from diffadapt.types.tensor_ops import add

_VALUES, _INDICES, _A, _B = (
    "supertuning_values",
    "supertuning_indices",
    "supertuning_lora_A",
    "supertuning_lora_B",
)
_ROWS, _COLUMNS, _DELTA = "supertuning_rows", "supertuning_columns", "supertuning_delta"


@dataclass(frozen=True, kw_only=True)
class SuperTuningConfig(AdapterConfig):
    """Settings of a new SuperTuning.

    Attributes:
        sparsity: the share of the elements of every weight that is not trained.
        largest: whether the elements with the largest absolute values are trained; if not, the smallest
            (`select_top` in PEFT).
        rank: the rank of the LoRA next to them; 0 for none.
        alpha: the numerator of the LoRA's scale `alpha / rank`. Defaults to twice the rank.
    """

    sparsity: float = 0.99
    largest: bool = True
    rank: int = 0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparsity < 1:
            raise AdapterError(f"sparsity is {self.sparsity}, expected 0 <= sparsity < 1")
        refuse_unless_whole("rank", self.rank, least=0)
        if self.alpha is not None and (not self.rank or self.alpha == 0):
            raise AdapterError(f"alpha is {self.alpha}, which needs a rank and must not be 0")

    @property
    def settings(self) -> dict[str, float]:
        """The scale of the LoRA, and which elements are trained."""
        scale = 1.0 if not self.rank else (2.0 if self.alpha is None else self.alpha / self.rank)
        return {"lora_scale": scale, "largest": float(self.largest)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    count, rank = rank_of(tensors, _VALUES, 0), rank_of(tensors, _A, 0)
    most = spec.out_features * spec.fan_in
    shapes: dict[str, tuple[int, ...]] = {_VALUES: (count,), _INDICES: (count,)}
    if _A in tensors or _B in tensors:
        shapes |= {_A: (rank, spec.fan_in), _B: (spec.out_features, rank)}
    found = checked(tensors, shapes, optional=(_INDICES,))
    places = found.get(_INDICES)
    are_inside = places is None or places.is_meta or bool(((places >= 0) & (places < most)).all())
    if count > most or not are_inside:
        raise AdapterError(f"{_INDICES} are not all below {most}, the number of elements of the weight")
    return found


def init(
    spec: LayerSpec, config: SuperTuningConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zeros, a Kaiming-uniform A and a zero B."""
    count = int(spec.out_features * spec.fan_in * (1 - config.sparsity))
    if not count:
        raise AdapterError(f"sparsity is {config.sparsity}, which leaves nothing of a weight {spec.weight_shape}")
    tensors = {_VALUES: torch.randn(count, generator=generator) * (0.0 if config.init else 1.0)}
    if config.rank:
        up = spec.out_features, config.rank
        tensors[_A] = uniform((config.rank, spec.fan_in), generator)
        tensors[_B] = torch.zeros(up) if config.init else uniform(up, generator)
    return tensors


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the positions, which follow from the base weight."""
    found: dict[str, Tensors] = {}
    for path, (tensors, spec, settings, weight, *_) in layers.items():
        places = tensors.get(_INDICES)
        if places is None:
            count, is_largest = tensors[_VALUES].numel(), bool(settings["largest"])
            stored = weight().reshape(spec.weight_shape)
            places = torch.topk(stored.abs().flatten(), count, largest=is_largest)[1].int()
        found[path] = {**tensors, _INDICES: places}
    return found


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the places and the factors, or the change of the weight if it is cheaper as a matrix."""
    values, places = tensors[_VALUES], tensors[_INDICES].long()
    prepared = {_VALUES: values, _ROWS: places // spec.fan_in, _COLUMNS: places % spec.fan_in}
    if _A in tensors:
        prepared |= {_A: tensors[_A], _B: tensors[_B] * surroundings.settings["lora_scale"]}
    if spec.kind == "linear" and is_sparse(values, spec.out_features, spec.fan_in):
        return prepared
    return {_DELTA: delta_weight(prepared, spec)}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    shape = spec.out_features, spec.fan_in
    delta = scattered(tensors[_ROWS], tensors[_COLUMNS], tensors[_VALUES], shape)
    if _A in tensors:
        delta = torch.addmm(delta, tensors[_B], tensors[_A])
    return delta.view(spec.weight_shape)


def onto_weight(adapter_type: AdapterType, tensors: Tensors, spec: LayerSpec, weight: Tensor, gate: Tensor) -> Tensor:
    """Return the weight plus the gated change."""
    if _DELTA in tensors:
        return torch.addcmul(weight, tensors[_DELTA], gate)
    total = scattered_onto(weight, tensors[_ROWS], tensors[_COLUMNS], tensors[_VALUES] * gate)
    if _A in tensors:
        total = total + spec.product(tensors[_A], tensors[_B]).view_as(total) * gate
    return total


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    values = (tensors[_VALUES] * gate).to(input.dtype)
    product = sparse_product(input, tensors[_ROWS], tensors[_COLUMNS], values, spec.out_features)
    output = product if onto is None else add(product, onto)
    return output if _A not in tensors else spec.low_rank(input, tensors[_A], tensors[_B], gate, output)


SUPERTUNING = AdapterType(
    name="supertuning",
    tensors=(_VALUES, _INDICES, _A, _B),
    identified_by=frozenset({_VALUES}),
    config=SuperTuningConfig,
    settings={"lora_scale": 1.0, "largest": 1.0},
    fixed=frozenset({_INDICES}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    delta_weight=delta_weight,
    delta_output=delta_output,
    in_weight=lambda tensors, spec: True,
    onto_weight=onto_weight,
)
