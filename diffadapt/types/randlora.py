"""RandLora: a full-rank sum of random low-rank changes, of which only scales are trained.

Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", arXiv 2502.00987, as in PEFT
0.21.2 `tuners/randlora/layer.py`. With m = min(out, columns), M the larger of both and n = ceil(m / rank) bases, the
change is the product of

    A'[i n + j] = lambda[i, j] gamma[j] * A[i, 0, :m]        (rank n, m)
    B'[:, j rank + i] = B[:M, j, i]                          (M, rank n)

paired in the order of their rows and columns: `scale * B' A'` if the columns are the smaller side, else its transpose.

| tensor | shape |
|---|---|
| `randlora_lambda` | (rank, n) |
| `randlora_gamma` | (n, m) |
| `randlora_A`, shared and not trained | (rank, 1, most m) |
| `randlora_B`, shared and not trained | (most M, most n, rank) |

The shared tensors follow from a seed and the largest layer, drawn in bfloat16 as PEFT does.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import RankedConfig, refuse_unless_whole
from diffadapt.types.formulas import by_matrix, checked, rank_of, unified
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted, shape_of

_LAMBDA, _GAMMA, _A, _B, _DELTA = (
    "randlora_lambda",
    "randlora_gamma",
    "randlora_A",
    "randlora_B",
    "randlora_delta",
)
_SPARSITIES = ("dense", "sparse", "very sparse")


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(RankedConfig):
    """Settings of a new RandLora (Albert et al., arXiv 2502.00987).

    Attributes:
        rank: the rank of one basis; the number of bases makes up the full rank of a layer.
        alpha: the numerator of the scale `alpha / rank`. Defaults to 20 times the rank, as recommended.
        seed: the seed of the bases (`projection_prng_key` in PEFT).
        bases: "dense", or with elements of 0, 1 and -1: "sparse", where 1 in 3 is not 0, or "very sparse", where 1 in
            the root of the smaller side is not.
    """

    seed: int = 0
    bases: Literal["dense", "sparse", "very sparse"] = "dense"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("seed", self.seed, least=0)
        if self.bases not in _SPARSITIES:
            raise AdapterError(f"bases is {self.bases!r}, expected one of {', '.join(_SPARSITIES)}")
        if self.use_dora or self.rank_pattern:
            raise AdapterError("use_dora and rank_pattern: a RandLora has no DoRA, and one rank for all layers")

    @property
    def settings(self) -> dict[str, float]:
        """The seed and the kind of the bases."""
        return {"seed": float(self.seed), "sparsity": float(_SPARSITIES.index(self.bases))}

    def alpha_of(self) -> float | None:
        """Return the alpha for which `alpha / rank` is the scale."""
        return 20.0 * self.rank if self.alpha is None and not self.rank_stabilized else super().alpha_of()


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    rank = rank_of(tensors, _LAMBDA, 0)
    least, most, count = _sizes(spec, rank or 1)
    found = checked(tensors, {_LAMBDA: (rank, count), _GAMMA: (count, least)})
    for name, shape in ((_A, (rank, 1, least)), (_B, (most, count, rank))):
        if name in tensors:
            given = shape_of(tensors[name])
            if len(given) != 3 or any(own < need for own, need in zip(given, shape, strict=True)):
                raise AdapterError(f"{name} has shape {given}, expected at least {shape}")
            found[name] = tensors[name]
    return found


def init(
    spec: LayerSpec, config: RandLoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a zero `lambda`, and a constant `gamma`."""
    least, _, count = _sizes(spec, config.rank)
    if config.init:
        return {
            _LAMBDA: torch.zeros(config.rank, count),
            _GAMMA: torch.full((count, least), 1 / max(count, least)),
        }
    return {
        _LAMBDA: torch.randn(config.rank, count, generator=generator) * 0.1,
        _GAMMA: torch.randn(count, least, generator=generator) * 0.1,
    }


def rank(tensors: Tensors) -> int:
    """Return the rank of one basis."""
    return tensors[_LAMBDA].shape[0]


def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    """Return the tensors with the shared bases. A file that has them once per layer has the same in all."""
    if not all(_A in layer.tensors and _B in layer.tensors for layer in layers.values()):
        first = next(iter(layers.values()))
        size = first.tensors[_LAMBDA].shape[0]
        rows, columns = max(x.spec.out_features for x in layers.values()), max(x.spec.fan_in for x in layers.values())
        a, b = _bases(rows, columns, size, first)
        layers = {path: layer._replace(tensors={**layer.tensors, _A: a, _B: b}) for path, layer in layers.items()}
    return unified(layers, (_A, _B))


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the change of the weight. It has full rank, so that one matrix is cheaper than the factors."""
    factor = promoted(tensors[_LAMBDA])
    size, count = factor.shape
    least, most, _ = _sizes(spec, size)
    a = factor.unsqueeze(2) * tensors[_A][..., :least].to(factor) * promoted(tensors[_GAMMA])
    b = tensors[_B][:most, :count].to(factor).flatten(1)
    product = b @ a.flatten(0, 1)
    delta = product if least == spec.fan_in else product.t()
    return {_DELTA: delta.reshape(spec.weight_shape).to(tensors[_LAMBDA].dtype)}


def _sizes(spec: LayerSpec, rank: int) -> tuple[int, int, int]:
    """Return the smaller and the larger side of the weight, and the number of bases."""
    least, most = sorted((spec.out_features, spec.fan_in))
    return least, most, -(-least // rank)


def _bases(rows: int, columns: int, rank: int, layer: Unfinished) -> tuple[Tensor, Tensor]:
    """Return the bases A and B for the largest layer, drawn from the seed as PEFT draws them."""
    least, most = sorted((rows, columns))
    count = -(-least // rank)
    device, sparsity = layer.tensors[_LAMBDA].device, int(layer.settings["sparsity"])
    if device.type == "meta":
        return torch.empty(rank, 1, least, device=device), torch.empty(most, count, rank, device=device)
    generator = torch.Generator().manual_seed(int(layer.settings["seed"]))
    if sparsity:
        share = 3 if sparsity == 1 else math.sqrt(least)
        drawn = [torch.rand(shape, generator=generator) for shape in ((rank, 1, least), (most, count, rank))]
        a, b = (
            torch.where(t < 1 / (2 * share), -1.0, 0.0) + torch.where(t > 1 - 1 / (2 * share), 1.0, 0.0) for t in drawn
        )
    else:
        a = _kaiming((rank, 1, least), generator)
        b = torch.cat([_kaiming((most, 1, rank), generator) for _ in range(count)], dim=1)
    return (a / a.std()).to(device), (b / b.std()).to(device)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    with torch.no_grad():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)


RANDLORA = AdapterType(
    name="randlora",
    tensors=(_LAMBDA, _GAMMA, _A, _B),
    identified_by=frozenset({_LAMBDA, _GAMMA}),
    config=RandLoraConfig,
    settings={"seed": 0.0, "sparsity": 0.0},
    fixed=frozenset({_A, _B}),
    shared=frozenset({_A, _B}),
    fit=fit,
    init=init,
    rank=rank,
    complete=complete,
    prepare=prepare,
    **by_matrix(lambda tensors, spec: tensors[_DELTA]),
)
