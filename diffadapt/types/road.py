"""RoAd: rotations and scales of pairs of outputs, `W' = T W` and `b' = T b`.

Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", arXiv
2409.00119, as in PEFT 0.21.2 `tuners/road/layer.py`. The outputs are taken in groups of `group_size`. The i-th output
of the first half of a group is paired with the i-th of the second half. With one angle and one scale per output:

    y1' = alpha1 cos(theta1) y1 - alpha1 sin(theta1) y2
    y2' = alpha2 cos(theta2) y2 + alpha2 sin(theta2) y1

| variant | `road_theta`, `road_alpha` | |
|---|---|---|
| 1 | (out / 2) | both outputs of a pair have the same angle and scale |
| 2 | (out) | |
| 4 | (2 out) | the cosine and the sine have angles and scales of their own, group by group |

The shape tells the variants apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Surroundings, Tensors
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import checked
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import promoted

_THETA, _ALPHA, _COSINES, _SINES = "road_theta", "road_alpha", "road_cosines", "road_sines"


@dataclass(frozen=True, kw_only=True)
class RoAdConfig(AdapterConfig):
    """Settings of a new RoAd (Liao and Monz, arXiv 2409.00119).

    Attributes:
        variant: 1, 2 or 4, the number of parameters per output (`road_1`, ... in PEFT); see the module.
        group_size: the number of outputs in a group; it must be even and divide the outputs.
    """

    variant: Literal[1, 2, 4] = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in (1, 2, 4):
            raise AdapterError(f"variant is {self.variant!r}, expected 1, 2 or 4")
        refuse_unless_whole("group_size", self.group_size, least=2)
        if self.group_size % 2:
            raise AdapterError(f"group_size is {self.group_size}, expected an even number")
        if self.dropout:
            raise AdapterError("dropout has no effect on RoAd, which has no input of its own; use module_dropout")

    @property
    def settings(self) -> dict[str, float]:
        """The size of the groups."""
        return {"group_size": self.group_size}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check that there are angles and scales for all outputs, and return them."""
    _refuse_groups(spec)
    out = spec.out_features
    size = tensors[_THETA].numel() if _THETA in tensors else out
    if 2 * size not in (out, 2 * out, 4 * out):
        raise AdapterError(f"{_THETA} has {size} elements, expected {out // 2}, {out} or {2 * out} for {out} outputs")
    return checked(tensors, {_THETA: (size,), _ALPHA: (size,)})


def init(
    spec: LayerSpec, config: RoAdConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return angles of 0 and scales of 1."""
    _refuse_groups(spec)
    if spec.out_features % config.group_size:
        raise AdapterError(f"group_size is {config.group_size}, which does not divide the {spec.out_features} outputs")
    size = spec.out_features * config.variant // 2
    deviation = 0.0 if config.init else 0.5
    return {
        _THETA: torch.randn(size, generator=generator) * deviation,
        _ALPHA: 1 + torch.randn(size, generator=generator) * deviation,
    }


def prepare(tensors: Tensors, spec: LayerSpec, surroundings: Surroundings) -> Tensors:
    """Return the factors of every output: `alpha cos(theta) - 1` and `alpha sin(theta)`, as (groups, 2, size / 2)."""
    size, out = int(surroundings.settings["group_size"]), spec.out_features
    if out % size or size % 2:
        raise AdapterError(f"group_size is {size}, which does not divide the {out} outputs into pairs")
    theta, alpha = promoted(tensors[_THETA]), promoted(tensors[_ALPHA])
    if 2 * theta.numel() == out:
        theta, alpha = (t.view(-1, 1, size // 2).expand(-1, 2, -1) for t in (theta, alpha))
    if theta.numel() == 2 * out:
        cosines, sines = (theta.view(-1, 2, size)[:, i] for i in (0, 1))
        cosines = alpha.view(-1, 2, size)[:, 0] * cosines.cos()
        sines = alpha.view(-1, 2, size)[:, 1] * sines.sin()
    else:
        cosines, sines = alpha * theta.cos(), alpha * theta.sin()
    return {_COSINES: cosines.reshape(-1, 2, size // 2) - 1, _SINES: sines.reshape(-1, 2, size // 2)}


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
    """Return `onto` plus the gated change that the rotations make to `vectors` along an axis."""
    axis %= vectors.ndim
    # One pass over memory less; in half precision, the sum with 1 would round small angles away.
    is_whole = onto is vectors and vectors.dtype in (torch.float32, torch.float64)
    after = (1,) * (vectors.ndim - axis - 1)
    (c1, c2), (s1, s2) = (
        (t * gate + own).to(vectors.dtype).view(*t.shape, *after).unbind(1)
        for t, own in ((tensors[_COSINES], float(is_whole)), (tensors[_SINES], 0.0))
    )
    halves = vectors.unflatten(axis, (-1, 2, tensors[_COSINES].shape[-1]))
    first, second = halves.unbind(axis + 1)
    if transposed:
        s1, s2 = -s2, -s1
    mapped = [torch.addcmul(c1 * first, second, -s1), torch.addcmul(c2 * second, first, s2)]
    change = torch.stack(mapped, axis + 1).flatten(axis, axis + 2)
    return change if onto is None or is_whole else onto + change


def _refuse_groups(spec: LayerSpec) -> None:
    if spec.groups > 1:
        raise AdapterError(f"the layer has {spec.groups} groups; a rotation of its outputs would mix them")


_SETTINGS: Mapping[str, float] = {"group_size": 64.0}

ROAD = AdapterType(
    name="road",
    tensors=(_THETA, _ALPHA),
    identified_by=frozenset({_THETA, _ALPHA}),
    config=RoAdConfig,
    settings=_SETTINGS,
    fit=fit,
    init=init,
    stages=lambda tensors, spec: ("output",),
    prepare=prepare,
    apply_map=apply_map,
    gains_bias=True,
)
