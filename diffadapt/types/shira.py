"""SHiRA: a sparse change of the weight, at places that are chosen once.

Bhardwaj et al., "Sparse High Rank Adapters", arXiv 2406.13175, as in PEFT 0.21.2 `tuners/shira/layer.py`. There is no
alpha. PEFT has `rank * (in + out)` elements in every layer, as many as a LoRA.

| tensor | shape |
|---|---|
| `shira_weight` | (n) |
| `shira_indices` | (2, n), rows and columns in the flattened weight, not trained |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import SizedConfig, refuse_unless_whole
from diffadapt.types.fourierft import fit_spectrum
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.sparse import is_sparse, random_places, scattered, scattered_onto, sparse_product
from diffadapt.types.tensor_ops import add

_WEIGHT, _INDICES, _DELTA = "shira_weight", "shira_indices", "shira_delta"


@dataclass(frozen=True, kw_only=True)
class SHiRAConfig(SizedConfig):
    """Settings of a new SHiRA (Bhardwaj et al., arXiv 2406.13175).

    Attributes:
        rank: sets the number of elements that are trained in each layer, `rank * (in + out)`.
        seed: the seed of their places.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("seed", self.seed, least=0)

    @property
    def settings(self) -> dict[str, float]:
        """The seed of the places."""
        return {"seed": float(self.seed)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the places are in the weight, and return the tensors."""
    if _INDICES not in tensors or _WEIGHT not in tensors:
        raise AdapterError(f"{_WEIGHT} and {_INDICES} expected, {', '.join(sorted(tensors))} found")
    places = tensors[_INDICES]
    if places.is_floating_point():
        # PEFT writes whole numbers as float32 on Windows.
        tensors = {**tensors, _INDICES: places.to(torch.int32)}
    return fit_spectrum(tensors, spec, _WEIGHT, _INDICES)


def init(
    spec: LayerSpec, config: SHiRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return zeros."""
    count, most = config.rank * (spec.out_features + spec.fan_in), spec.out_features * spec.fan_in
    if count > most:
        raise AdapterError(f"rank is {config.rank}, which makes {count} elements, and the weight has {most}")
    return {_WEIGHT: torch.randn(count, generator=generator) * (0.0 if config.init else 1.0)}


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the places, sorted by rows, which follow from the seed."""
    found: dict[str, Tensors] = {}
    for path, (tensors, spec, settings, _, *_) in layers.items():
        known = tensors.get(_INDICES)
        if known is None:
            weight = tensors[_WEIGHT]
            drawn = random_places(
                spec.out_features, spec.fan_in, weight.numel(), int(settings["seed"]), weight.device
            ).int()
            order = (drawn[0].long() * spec.fan_in + drawn[1]).argsort()
            known = drawn[:, order]
        found[path] = {**tensors, _INDICES: known}
    return found


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change as a matrix, unless it has so few elements that it is cheaper without."""
    if spec.kind == "linear" and is_sparse(tensors[_WEIGHT], spec.out_features, spec.fan_in):
        return tensors
    return {_DELTA: delta_weight(tensors, spec)}


def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
    """Return the change in the canonical weight shape."""
    if _DELTA in tensors:
        return tensors[_DELTA]
    rows, columns = tensors[_INDICES].unbind(0)
    return scattered(rows, columns, tensors[_WEIGHT], (spec.out_features, spec.fan_in)).view(spec.weight_shape)


def onto_weight(adapter_type: AdapterType, tensors: Tensors, spec: LayerSpec, weight: Tensor, gate: Tensor) -> Tensor:
    """Return the weight plus the gated change."""
    if _DELTA in tensors:
        return torch.addcmul(weight, tensors[_DELTA], gate)
    rows, columns = tensors[_INDICES].unbind(0)
    return scattered_onto(weight, rows, columns, tensors[_WEIGHT] * gate)


def delta_output(
    tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
) -> Tensor:
    """Return `onto` plus the gated change."""
    if _DELTA in tensors:
        return spec.dense(input, tensors[_DELTA], gate, onto)
    rows, columns = tensors[_INDICES].unbind(0)
    values = (tensors[_WEIGHT] * gate).to(input.dtype)
    product = sparse_product(input, rows, columns, values, spec.out_features)
    return product if onto is None else add(product, onto)


SHIRA = AdapterType(
    name="shira",
    tensors=(_WEIGHT, _INDICES),
    identified_by=frozenset({_WEIGHT}),
    config=SHiRAConfig,
    settings={"seed": 0.0},
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
