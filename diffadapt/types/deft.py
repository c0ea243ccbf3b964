"""DEFT: a subspace of the outputs is taken out of the weight and filled anew: `W' = W - P p(P)' W + scale * P R`.

As in PEFT 0.21.2 `tuners/deft/layer.py`. For "relu", p is the element-wise maximum with 0; for "qr", the orthonormal
basis Q of the columns of P stands for both P and p(P). Without R, the subspace stays empty.

| tensor | shape |
|---|---|
| `deft_P` | (out, rank) |
| `deft_R` | (rank, in / groups x kernel), or absent |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import RankedConfig
from diffadapt.types.formulas import by_factors, checked, flat, rank_of
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted

_P, _R, _DOWN, _UP = "deft_P", "deft_R", "deft_down", "deft_up"
_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class DEFTConfig(RankedConfig):
    """Settings of a new DEFT.

    Attributes:
        projection: "relu" or "qr" (`decomposition_method` in PEFT); see the module.
        remove_only: whether to train no R (`para` in PEFT). Such an adapter cannot start without an effect, so it
            requires `init="peft"`.
        init: with `True`, R starts as what P takes out, so that the adapter has no effect; "peft" does the same, or
            starts P alone at random as PEFT does. With `False` all tensors are random.
    """

    projection: Literal["relu", "qr"] = "relu"
    remove_only: bool = False

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "peft", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise AdapterError("use_dora: there is no DoRA of DEFT")
        if self.projection not in ("relu", "qr"):
            raise AdapterError(f"projection is {self.projection!r}, expected 'relu' or 'qr'")
        if self.remove_only and self.init is True:
            raise AdapterError("remove_only: a DEFT without R cannot start without an effect; set init='peft'")

    @property
    def settings(self) -> dict[str, float]:
        """Whether the projection is "qr"."""
        return {"qr": float(self.projection == "qr")}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    _refuse(spec)
    rank = rank_of(tensors, _P, -1)
    return checked(tensors, {_P: (spec.out_features, rank), _R: (rank, spec.fan_in)}, optional=(_R,))


def init(
    spec: LayerSpec, config: DEFTConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return a normal `P`, and an `R` that cancels what `P` takes out of the weight."""
    _refuse(spec)
    rank = min(config.rank, spec.out_features)
    deviation = _DEVIATION if config.init else 1.0
    p = torch.randn(spec.out_features, rank, generator=generator) * deviation
    if config.remove_only:
        return {_P: p}
    if not config.init:
        return {_P: p, _R: torch.randn(rank, spec.fan_in, generator=generator)}
    scale = config.alpha_of()
    rows = weight().flatten(1)
    taken = _projected(p.to(rows), config.settings["qr"])[1].mT @ rows
    return {_P: p, _R: taken / (1.0 if scale is None else scale / rank)}


def rank(tensors: Tensors) -> int:
    """Return the number of columns of `P`."""
    return tensors[_P].shape[-1]


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `up`, and a `down` whose change at the scale of the layer is the whole change."""
    p = promoted(tensors[_P])
    up, right = _projected(p, surroundings.settings["qr"])
    taken = right.mT @ surroundings.weight().flatten(1).to(p) / surroundings.scale
    down = promoted(tensors[_R]) - taken if _R in tensors else -taken
    return {_DOWN: flat(down.to(tensors[_P].dtype), spec), _UP: up.to(tensors[_P].dtype)}


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    return tensors[_DOWN], tensors[_UP]


def _projected(p: Tensor, qr: float) -> tuple[Tensor, Tensor]:
    """Return P and p(P), or twice the orthonormal basis."""
    if not qr:
        return p, p.relu()
    basis = torch.linalg.qr(p)[0]
    return basis, basis


def _refuse(spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; a subspace of its outputs would mix them")


DEFT = AdapterType(
    name="deft",
    tensors=(_P, _R),
    identified_by=frozenset({_P, _R}),
    config=DEFTConfig,
    settings={"qr": 0.0},
    fit=fit,
    init=init,
    rank=rank,
    prepare=prepare,
    reads_weight=lambda tensors: True,
    **by_factors(factors),
)
