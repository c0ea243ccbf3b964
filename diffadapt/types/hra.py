"""HRA: a chain of Householder reflections of the inputs, `W' = W H`.

Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", arXiv
2405.17484, as in PEFT 0.21.2 `tuners/hra/layer.py`. With u[i] column i of `hra_u`, divided by its norm,

    H = (I - 2 u[0] u[0]') (I - 2 u[1] u[1]') ... = I - U T U'

where T is the inverse of the upper triangle of U' U with its diagonal halved (Joffrain et al., "Accumulating
Householder transformations, revisited", 2006). In the variant with Gram-Schmidt, the columns are made orthogonal first,
and T is 2 I. So the cost is that of two factors.

| tensor | shape |
|---|---|
| `hra_u` | (in x kernel, rank) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Stage, Surroundings, Tensors
from diffadapt.types.config import SizedConfig
from diffadapt.types.formulas import checked, rank_of, uniform
from diffadapt.types.layer_spec import LayerSpec, plain_spec
from diffadapt.types.tensor_ops import along, promoted, scaled

_U, _LEFT, _RIGHT = "hra_u", "hra_left", "hra_right"


@dataclass(frozen=True, kw_only=True)
class HRAConfig(SizedConfig):
    """Settings of a new HRA (Yuan et al., arXiv 2405.17484).

    Attributes:
        rank: the number of reflections. An odd number of reflections is never the identity, so that it requires
            `init="peft"`.
        gram_schmidt: whether to make the vectors orthogonal (`apply_GS` in PEFT). It excludes an even start: with
            orthogonal vectors no number of reflections is the identity, so that it requires `init="peft"`, too.
        init: with `True`, equal vectors in pairs, whose reflections cancel. With "peft" the same for an even rank, and
            random vectors for an odd one, as in PEFT; such an adapter has an effect from the start. With `False` all
            vectors are random.
    """

    gram_schmidt: bool = False

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "peft", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is True and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise AdapterError(
                "rank is odd, and an odd number of reflections is never the identity; use an even rank, or init='peft' "
                "to start with an effect"
            )
        if self.init is True and self.gram_schmidt:
            raise AdapterError(
                "gram_schmidt: reflections along orthogonal vectors are never the identity; use init='peft' to start "
                "with an effect"
            )
        if self.dropout:
            raise AdapterError("dropout has no effect on HRA; use module_dropout")

    @property
    def settings(self) -> dict[str, float]:
        """Whether to make the vectors orthogonal."""
        return {"gram_schmidt": float(self.gram_schmidt)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that the vectors have an element for every input, and return them."""
    _refuse(spec)
    return checked(tensors, {_U: (spec.fan_in, rank_of(tensors, _U, -1))})


def geometry(tensors: Tensors) -> LayerSpec:
    """Return the spec of a linear layer with as many inputs as the vectors have elements."""
    return plain_spec(0, rank_of(tensors, _U, 0))


def init(
    spec: LayerSpec, config: HRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return Kaiming-uniform vectors, each of them twice."""
    _refuse(spec)
    columns, rank = spec.fan_in, config.rank
    if rank > columns:
        raise AdapterError(f"rank is {rank}, expected at most {columns}, the number of inputs")
    if not config.init or rank % 2:
        return {_U: uniform((columns, rank), generator)}
    return {_U: uniform((columns, rank // 2), generator).repeat_interleave(2, 1)}


def stages(tensors: Tensors, spec: LayerSpec) -> tuple[Stage, ...]:
    """Return "input", or "patch" for a layer with a kernel."""
    return ("patch",) if spec.has_kernel else ("input",)


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return `-U T` and `U`, whose product with a transposed `U` is `H - I`, in float32 or wider."""
    u = promoted(tensors[_U])
    if surroundings.settings["gram_schmidt"]:
        basis = torch.linalg.qr(u)[0]
        return {_LEFT: -2 * basis, _RIGHT: basis}
    u = u / u.norm(dim=0)
    products = (u.mT @ u).triu(1) + 0.5 * torch.eye(u.shape[1]).to(u)
    return {_LEFT: -torch.linalg.solve_triangular(products, u, upper=True, left=False), _RIGHT: u}


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
    """Return `onto` plus the gated change that the reflections make to `vectors` along an axis."""
    left, right = (tensors[name].to(vectors.dtype) for name in (_LEFT, _RIGHT))
    if transposed:
        left, right = right, left
    hidden = scaled(along(vectors, right.mT, axis), gate)
    if onto is not None and axis % vectors.ndim == vectors.ndim - 1:
        rows = torch.addmm(onto.reshape(-1, onto.shape[-1]), hidden.reshape(-1, left.shape[1]), left.mT)
        return rows.view(onto.shape)
    product = along(hidden, left, axis)
    return product if onto is None else onto + product


def _refuse(spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; a reflection of its inputs would mix them")
    if spec.kind == "embedding":
        raise AdapterError("an embedding has no inputs to reflect; exclude it")


HRA = AdapterType(
    name="hra",
    tensors=(_U,),
    identified_by=frozenset({_U}),
    config=HRAConfig,
    settings={"gram_schmidt": 0.0},
    fit=fit,
    geometry=geometry,
    init=init,
    stages=stages,
    prepare=prepare,
    apply_map=apply_map,
    orthogonal=True,
)
