"""PSOFT: the principal subspace of the weight is rotated, `W' = W + B (R - I) A`.

Wu et al., "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", arXiv 2505.11235, as in PEFT 0.21.2
`tuners/psoft/layer.py`. From the singular value decomposition of the base weight, `A = V'` and `B = U S`, or both with
the root of S ("pissa_init"), for the `rank` largest singular values. R is `diag(b) Q diag(a)`, and Q is

    (I + K) (I - K)^-1                            exact, for the skew-symmetric K with upper triangle `psoft_R`
    I + 2 K + 2 K^2 + ... + 2 K^(n-2) + K^(n-1)   n terms of the Neumann series
    psoft_R itself                                if that is a matrix

PEFT's alpha cancels. PEFT computes A and B from the weight whenever it loads an adapter; the signs of singular vectors
may differ between devices, and so may what the same file means. Here they are tensors of the adapter.

| tensor | shape |
|---|---|
| `psoft_R` | (rank (rank - 1) / 2), or (rank, rank) |
| `psoft_vector_a`, `psoft_vector_b` | (rank), each optional |
| `psoft_A` | (rank, in / groups x kernel), not trained |
| `psoft_B` | (out, rank), not trained |
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors, Unfinished
from diffadapt.types.config import SizedConfig, refuse_unless_whole
from diffadapt.types.decomposition import principal, randomised_principal
from diffadapt.types.formulas import by_factors, checked, flat
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.oft import cayley, neumann, skew_symmetric
from diffadapt.types.tensor_ops import promoted

_R, _VECTOR_A, _VECTOR_B, _A, _B = "psoft_R", "psoft_vector_a", "psoft_vector_b", "psoft_A", "psoft_B"
_UP = "psoft_up"


@dataclass(frozen=True, kw_only=True)
class PSOFTConfig(SizedConfig):
    """Settings of a new PSOFT (Wu et al., arXiv 2505.11235).

    Attributes:
        orthogonal: whether R is a rotation; if not, it is any matrix.
        scales: whether to train the vectors a and b, too.
        neumann_terms: the number of terms of the Neumann series; 0 for the exact inverse.
        neumann_limit: the largest Frobenius norm of K in the Neumann series; 0 for no limit.
        split: "psoft" to put the singular values into B, "pissa" to split them between A and B.
        svd_iterations: the number of iterations of a randomised decomposition; 0 for the exact one.
        seed: the seed of the randomised decomposition.
    """

    orthogonal: bool = True
    scales: bool = True
    neumann_terms: int = 0
    neumann_limit: float = 0.0
    split: Literal["psoft", "pissa"] = "psoft"
    svd_iterations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("seed", self.seed, least=0)
        refuse_unless_whole("neumann_terms", self.neumann_terms, least=0)
        refuse_unless_whole("svd_iterations", self.svd_iterations, least=0)
        if self.neumann_terms == 1:
            raise AdapterError("neumann_terms is 1, expected 0 or at least 2")
        if self.split not in ("psoft", "pissa"):
            raise AdapterError(f"split is {self.split!r}, expected 'psoft' or 'pissa'")
        if (self.neumann_terms and not self.orthogonal) or (self.neumann_limit and not self.neumann_terms):
            raise AdapterError("neumann_terms needs orthogonal=True, and neumann_limit needs neumann_terms")

    @property
    def settings(self) -> dict[str, float]:
        """The numbers by which R, A and B are computed."""
        return {
            "neumann_terms": self.neumann_terms,
            "neumann_limit": self.neumann_limit,
            "pissa": float(self.split == "pissa"),
            "svd_iterations": self.svd_iterations,
            "seed": self.seed,
        }


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    given = tensors.get(_R)
    is_matrix = given is not None and given.ndim == 2
    rank = 0 if given is None else given.shape[0] if is_matrix else (1 + math.isqrt(1 + 8 * given.numel())) // 2
    shapes = {
        _R: (rank, rank) if is_matrix else (rank * (rank - 1) // 2,),
        _VECTOR_A: (rank,),
        _VECTOR_B: (rank,),
        _A: (rank, spec.fan_in),
        _B: (spec.out_features, rank),
    }
    _refuse(rank, spec)
    return checked(tensors, shapes, optional=(_VECTOR_A, _VECTOR_B, _A, _B))


def init(
    spec: LayerSpec, config: PSOFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return an R that is the identity."""
    rank, deviation = config.rank, 0.0 if config.init else 0.1
    _refuse(rank, spec)
    if config.orthogonal:
        tensors = {_R: torch.randn(rank * (rank - 1) // 2, generator=generator) * deviation}
    else:
        tensors = {_R: torch.eye(rank) + torch.randn(rank, rank, generator=generator) * deviation}
    if config.scales:
        for name in (_VECTOR_A, _VECTOR_B):
            tensors[name] = 1 + torch.randn(rank, generator=generator) * deviation
    return tensors


def complete(layers: Mapping[str, Unfinished]) -> dict[str, Tensors]:
    """Return the tensors with the factors of the principal part of the base weight, decomposed in float32."""
    found: dict[str, Tensors] = {}
    for path, (tensors, _, settings, weight, *_) in layers.items():
        found[path] = tensors
        if _A not in tensors or _B not in tensors:
            rank = _size(tensors[_R])
            u, s, vh = _principal(weight().flatten(1).float(), rank, settings)
            left, right = (s.sqrt(), s.sqrt()) if settings["pissa"] else (s, torch.ones_like(s))
            found[path] = {**tensors, _A: right.unsqueeze(1) * vh, _B: u * left}
    return found


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `up`, which is `B (R - I)`, and A."""
    given, settings = promoted(tensors[_R]), surroundings.settings
    identity = torch.eye(_size(given)).to(given)
    if given.ndim == 2:
        change = given - identity
    else:
        skew, limit = skew_symmetric(given.unsqueeze(0))[0], settings["neumann_limit"]
        if settings["neumann_terms"]:
            if limit:
                norm = torch.linalg.matrix_norm(skew)
                skew = torch.where(norm > limit, skew * (limit / (norm + 1e-12)), skew)
            change = neumann(skew, int(settings["neumann_terms"]))
        else:
            change = cayley(skew)
    if _VECTOR_A in tensors or _VECTOR_B in tensors:
        ones = torch.ones(len(identity)).to(given)
        a, b = (promoted(tensors.get(name, ones)) for name in (_VECTOR_A, _VECTOR_B))
        change = b.unsqueeze(1) * change * a + torch.diag(a * b - 1)
    up = promoted(tensors[_B]) @ change
    return {_UP: up.to(tensors[_B].dtype), _A: tensors[_A]}


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return flat(tensors[_A], spec), tensors[_UP]


def _principal(weight: Tensor, rank: int, settings: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest singular values of a matrix and their vectors: (out, rank), (rank,) and (rank, in)."""
    iterations = int(settings["svd_iterations"])
    if not iterations:
        return principal(weight, rank)
    return randomised_principal(weight, rank, iterations, int(settings["seed"]))


def _size(given: Tensor) -> int:
    """Return the rank, from a matrix or from the upper triangle of one."""
    return given.shape[0] if given.ndim == 2 else (1 + math.isqrt(1 + 8 * given.numel())) // 2


def _refuse(rank: int, spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups, whose weights have no common principal subspace")
    if not 2 <= rank <= min(spec.out_features, spec.fan_in):
        raise AdapterError(
            f"rank is {rank}, expected 2 to {min(spec.out_features, spec.fan_in)} for a weight of shape "
            f"({spec.out_features}, {spec.fan_in})"
        )


PSOFT = AdapterType(
    name="psoft",
    tensors=(_R, _VECTOR_A, _VECTOR_B, _A, _B),
    identified_by=frozenset({_R}),
    config=PSOFTConfig,
    settings={"neumann_terms": 0.0, "neumann_limit": 0.0, "pissa": 0.0, "svd_iterations": 0.0, "seed": 0.0},
    fixed=frozenset({_A, _B}),
    fit=fit,
    init=init,
    complete=complete,
    prepare=prepare,
    **by_factors(factors),
)
