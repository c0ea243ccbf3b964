"""HiRA: the weight times a low-rank matrix, element by element: `W' = W + W * (B A)`.

Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation", ICLR 2025, as in PEFT 0.21.2
`tuners/hira/layer.py`. The change has full rank, so it is computed as one matrix. There is no alpha.

| tensor | linear layer, embedding | convolution |
|---|---|---|
| `hira_A` | (rank, in) | (rank, in / groups, *kernel) |
| `hira_B` | (out, rank) | (out, rank) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import SizedConfig
from diffadapt.types.formulas import by_matrix, checked, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec

_A, _B, _DELTA = "hira_A", "hira_B", "hira_delta"


@dataclass(frozen=True, kw_only=True)
class HiRAConfig(SizedConfig):
    """Settings of a new HiRA (Huang et al., ICLR 2025).

    Attributes:
        init: the initial distribution of `hira_A`: Kaiming-uniform with `True`, normal with a standard deviation of
            `1 / rank` with "gaussian". `hira_B` starts at zero. With `False` both are random.
    """

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "gaussian", False)


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank = rank_of(tensors, _A, 0)
    return checked(tensors, {_A: (rank, *spec.weight_shape[1:]), _B: (spec.out_features, rank)})


def init(
    spec: LayerSpec, config: HiRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a random `A`, and a zero `B`."""
    rank, up = config.rank, (spec.out_features, config.rank)
    down = (rank, *spec.weight_shape[1:])
    gaussian = config.init == "gaussian"
    return {
        _A: torch.randn(down, generator=generator) / rank if gaussian else uniform(down, generator),
        _B: torch.zeros(up) if config.init else uniform(up, generator),
    }


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change of the weight."""
    a, b = tensors[_A], tensors[_B]
    return {_DELTA: (b @ a.flatten(1)).view(spec.weight_shape) * surroundings.weight().to(a)}


HIRA = AdapterType(
    name="hira",
    tensors=(_A, _B),
    identified_by=frozenset({_A, _B}),
    config=HiRAConfig,
    fit=fit,
    init=init,
    prepare=prepare,
    reads_weight=lambda tensors: True,
    masked={_B: 1},
    **by_matrix(lambda tensors, spec: tensors[_DELTA]),
)
