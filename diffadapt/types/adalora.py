"""AdaLoRA: a LoRA with singular values, of which training keeps the important ones.

Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, as in PEFT 0.21.2
`tuners/adalora/layer.py`: `W' = W + alpha / (rank + 1e-5) * up diag(E) down`, with the rank at which training began.
A file has the components that training kept; a layer may have none.

| tensor | linear layer | convolution |
|---|---|---|
| `lora_down` | (kept, in) | (kept, in / groups, *kernel) |
| `lora_up` | (out, kept) | (out, kept) |
| `lora_E` | (kept, 1) | (kept, 1) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.config import RankedConfig, refuse_unless_whole
from diffadapt.types.formulas import by_factors
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import shape_of

_DOWN, _UP, _E = "lora_down", "lora_up", "lora_E"
_DEVIATION = 0.02
DIVISOR_EPS = 1e-5
"""What PEFT adds to the rank that alpha is divided by."""


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(RankedConfig):
    """Settings of a new AdaLoRA (Zhang et al., arXiv 2303.10512).

    Attributes:
        rank: the rank at which training begins (`init_r` in PEFT).
        target_rank: the rank that layers have on average in the end (`target_r` in PEFT); see `RankAllocator`.
        orthogonality: the weight of the penalty for factors that are not orthogonal; see `RankAllocator.penalty`.
    """

    rank: int = 12
    target_rank: int = 8
    orthogonality: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("target_rank", self.target_rank)
        if self.orthogonality < 0:
            raise AdapterError(f"orthogonality is {self.orthogonality}, expected at least 0")
        if self.target_rank > self.rank:
            raise AdapterError(f"target_rank is {self.target_rank}, expected at most the rank, {self.rank}")
        if self.use_dora or self.rank_pattern:
            raise AdapterError("use_dora and rank_pattern: an AdaLoRA has no DoRA, and begins with one rank everywhere")

    @property
    def settings(self) -> dict[str, float]:
        """The rank that alpha is divided by."""
        return {"rank": self.rank + DIVISOR_EPS}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    missing = [name for name in (_DOWN, _UP, _E) if name not in tensors]
    if missing:
        raise AdapterError(f"{', '.join(missing)} missing, only {', '.join(sorted(tensors))} found")
    rank = tensors[_E].numel()
    shapes = {_DOWN: (rank, *spec.weight_shape[1:]), _UP: (spec.out_features, rank), _E: (rank, 1)}
    for name, shape in shapes.items():
        if tensors[name].numel() != torch.Size(shape).numel() or tensors[name].shape[0] != shape[0]:
            raise AdapterError(f"{name} has shape {shape_of(tensors[name])}, expected {shape}")
    return {name: tensors[name].reshape(shape) for name, shape in shapes.items()}


def init(
    spec: LayerSpec, config: AdaLoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return normal factors, and singular values of zero."""
    rank, deviation = config.rank, _DEVIATION if config.init else 1.0
    return {
        _DOWN: torch.randn(rank, *spec.weight_shape[1:], generator=generator) * deviation,
        _UP: torch.randn(spec.out_features, rank, generator=generator) * deviation,
        _E: torch.randn(rank, 1, generator=generator) * (0.0 if config.init else 1.0),
    }


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down`, multiplied by the singular values, and `up`."""
    down = tensors[_DOWN]
    return down * tensors[_E].view(-1, *(1,) * (down.ndim - 1)), tensors[_UP]


ADALORA = AdapterType(
    name="adalora",
    tensors=(_DOWN, _UP, _E),
    identified_by=frozenset({_E}),
    config=AdaLoraConfig,
    settings={"rank": 12.0},
    fit=fit,
    init=init,
    masked={_UP: 1},
    **by_factors(factors),
)
