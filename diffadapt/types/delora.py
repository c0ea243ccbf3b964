"""DeLoRA: a low-rank change of normalised components with one trained strength for all of them.

Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation", arXiv 2503.18225, as in PEFT 0.21.2
`tuners/delora/layer.py`. With n[j] the norm of column j of the base weight when the adapter was made:

    W'[o, j] = W[o, j] + lambda / rank * n[j] * sum over i of B[o, i] A[i, j] / (|A[i]| |B[:, i]|)

Norms of A and B below 1e-4 count as 1e-4, so that an adapter with B = 0 changes nothing.

| tensor | shape |
|---|---|
| `delora_A` | (rank, in / groups x kernel) |
| `delora_B` | (out, rank) |
| `delora_lambda` | (1) |
| `delora_w_norm` | (in / groups x kernel), not trained |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import SizedConfig
from diffadapt.types.formulas import by_factors, checked, flat, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted

_A, _B, _LAMBDA, _NORM = "delora_A", "delora_B", "delora_lambda", "delora_w_norm"
_DOWN, _UP = "delora_down", "delora_up"
_LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRAConfig(SizedConfig):
    """Settings of a new DeLoRA (Bini et al., arXiv 2503.18225).

    Attributes:
        strength: the initial lambda, which bounds the change of the weight (`delora_lambda` in PEFT).
    """

    strength: float = 15.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strength > 0:
            raise AdapterError(f"strength is {self.strength}, expected more than 0")


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank = rank_of(tensors, _A, 0)
    shapes = {_A: (rank, spec.fan_in), _B: (spec.out_features, rank), _LAMBDA: (1,), _NORM: (spec.fan_in,)}
    return checked(tensors, shapes, optional=(_NORM,))


def init(
    spec: LayerSpec, config: DeLoRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a Kaiming-uniform `A`, a zero `B` and the initial strength."""
    up = spec.out_features, config.rank
    return {
        _A: uniform((config.rank, spec.fan_in), generator),
        _B: torch.zeros(up) if config.init else uniform(up, generator),
        _LAMBDA: torch.full((1,), float(config.strength)),
    }


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the norms of the base weight's columns."""
    found: dict[str, Tensors] = {}
    for path, (tensors, _, _, weight, *_) in layers.items():
        norm = tensors.get(_NORM)
        if norm is None:
            norm = weight().flatten(1).norm(dim=0).to(tensors[_A])
        found[path] = {**tensors, _NORM: norm}
    return found


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `down`, with everything but `B` in it, and `up`."""
    a, b = promoted(tensors[_A]), promoted(tensors[_B])
    norms = a.norm(dim=1).clamp_min(_LEAST) * b.norm(dim=0).clamp_min(_LEAST)
    strengths = promoted(tensors[_LAMBDA]) / a.shape[0] / norms
    down = a * strengths.unsqueeze(1) * promoted(tensors[_NORM])
    return {_DOWN: flat(down.to(tensors[_A].dtype), spec), _UP: tensors[_B]}


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return tensors[_DOWN], tensors[_UP]


DELORA = AdapterType(
    name="delora",
    tensors=(_A, _B, _LAMBDA, _NORM),
    identified_by=frozenset({_A, _B}),
    config=DeLoRAConfig,
    fixed=frozenset({_NORM}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    **by_factors(factors),
)
