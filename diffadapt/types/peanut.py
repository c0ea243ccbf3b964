"""PEANuT: a change that a small network computes from the weight itself.

Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", arXiv 2410.01870, as in PEFT
0.21.2 `tuners/peanut/layer.py`. With f the activation, and the residual connections of a symmetric encoder and decoder,

    h = f(W' A'),  h[i + 1] = f(h[i] E[i]'),  h = f(h D[i]') + h[depth - 1 - i],  change = scaling * (h B')'

There is no alpha.

| tensor | shape |
|---|---|
| `peanut_A` | (rank, out) |
| `peanut_B` | (out, rank) |
| `peanut_encoder_<i>`, `peanut_decoder_<i>` | (rank, rank), for every i below the depth |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import SizedConfig, refuse_unless_whole
from diffadapt.types.formulas import by_matrix, checked, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec

_A, _B, _DELTA = "peanut_A", "peanut_B", "peanut_delta"
MOST_LAYERS = 16
"""Encoder layers that a file may have."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "linear": lambda values: values,
}
"""Activations by the names that transformers has for them."""


@dataclass(frozen=True, kw_only=True)
class PEANuTConfig(SizedConfig):
    """Settings of a new PEANuT (Zhong et al., arXiv 2410.01870).

    Attributes:
        depth: the number of encoder layers, and of decoder layers.
        activation: a name in `ACTIVATIONS` (`act_fn` in PEFT).
        scaling: the factor of the change.
    """

    depth: int = 0
    activation: str = "relu"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("depth", self.depth, least=0)
        if self.depth > MOST_LAYERS:
            raise AdapterError(f"depth is {self.depth}, expected at most {MOST_LAYERS}")
        if self.activation not in ACTIVATIONS:
            raise AdapterError(f"activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        if self.scaling == 0:
            raise AdapterError("scaling is 0: the adapter could not learn")

    @property
    def settings(self) -> dict[str, float]:
        """The factor of the change, and the position of the activation in `ACTIVATIONS`."""
        return {"scaling": float(self.scaling), "activation": float(list(ACTIVATIONS).index(self.activation))}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank, depth = rank_of(tensors, _A, 0), sum(name.startswith("peanut_encoder") for name in tensors)
    shapes: dict[str, tuple[int, int]] = {_A: (rank, spec.out_features), _B: (spec.out_features, rank)}
    shapes |= {name: (rank, rank) for number in range(depth) for name in _layer(number)}
    found = checked(tensors, shapes)
    if found.keys() != tensors.keys():
        raise AdapterError(f"{', '.join(sorted(tensors.keys() - found.keys()))} without an encoder layer")
    return found


def init(
    spec: LayerSpec, config: PEANuTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return Kaiming-uniform layers, the last of which is zero."""
    rank, out = config.rank, spec.out_features
    tensors = {_A: uniform((rank, out), generator)}
    tensors |= {name: uniform((rank, rank), generator) for n in range(config.depth) for name in _layer(n)}
    return {**tensors, _B: torch.zeros(out, rank) if config.init else uniform((out, rank), generator)}


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change of the weight."""
    activation = list(ACTIVATIONS.values())[int(surroundings.settings["activation"])]
    a = tensors[_A]
    hidden = activation(F.linear(surroundings.weight().flatten(1).to(a).t(), a))
    depth = sum(name.startswith("peanut_encoder") for name in tensors)
    residuals: list[Tensor] = []
    for number in range(depth):
        residuals.append(hidden)
        hidden = activation(F.linear(hidden, tensors[_layer(number)[0]]))
    for number in range(depth):
        hidden = activation(F.linear(hidden, tensors[_layer(number)[1]])) + residuals[depth - 1 - number]
    delta = surroundings.settings["scaling"] * (tensors[_B] @ hidden.t())
    return {_DELTA: delta.view(spec.weight_shape)}


def _layer(number: int) -> tuple[str, str]:
    """Return the names of an encoder layer and of its decoder layer."""
    return f"peanut_encoder_{number}", f"peanut_decoder_{number}"


PEANUT = AdapterType(
    name="peanut",
    tensors=(_A, _B, *(name for number in range(MOST_LAYERS) for name in _layer(number))),
    identified_by=frozenset({_A, _B}),
    config=PEANuTConfig,
    settings={"scaling": 1.0, "activation": 0.0},
    fit=fit,
    init=init,
    prepare=prepare,
    reads_weight=lambda tensors: True,
    **by_matrix(lambda tensors, spec: tensors[_DELTA]),
)
