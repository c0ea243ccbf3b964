"""VeRA and PVeRA: two random projections that all layers share, and two trained vectors per layer.

Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, as in PEFT 0.21.2
`tuners/vera/layer.py`. A layer uses as many columns of A and rows of B as it needs:

    W' = W + diag(b) B[:out] diag(d) A[:, :columns]

The projections follow from a seed and the largest layer; files may have them or not. In PVeRA
(`tuners/pvera/layer.py`), d and A have twice as many rows: what the second half makes of an input is the logarithm of
a variance, with which training draws samples around what the first half makes of it. Otherwise, the first half counts.

| tensor | VeRA | PVeRA |
|---|---|---|
| `lambda_b` | (out) | (out) |
| `lambda_d` | (rank) | (2 rank) |
| `A`, shared and not trained | (rank, most columns) | (2 rank, most columns) |
| `B`, shared and not trained | (most outputs, rank) | (most outputs, rank) |

Names have the prefix `vera_` or `pvera_`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import checked, flat, rank_of, unified
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.tensor_ops import add, scaled, shape_of

_SAMPLES = "pvera_samples"
"""A tensor that `PVERA` has in training only."""


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Settings of a new VeRA (Kopiczko et al., arXiv 2310.11454).

    Attributes:
        rank: the rank of the projections, the same for all layers.
        d_initial: the initial value of the vector between the projections.
        seed: the seed of the projections (`projection_prng_key` in PEFT).
    """

    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("rank", self.rank)
        refuse_unless_whole("seed", self.seed, least=0)
        if self.d_initial == 0:
            raise AdapterError("d_initial is 0, with which the adapter could not learn")

    @property
    def settings(self) -> dict[str, float]:
        """The seed of the projections."""
        return {"seed": float(self.seed)}


@dataclass(frozen=True, kw_only=True)
class PVeRAConfig(VeRAConfig):
    """Settings of a new PVeRA, a VeRA whose training samples the activations between the projections."""


def _vera(name: str, config: type[VeRAConfig], halves: int) -> AdapterType:
    """Return VeRA or, with two halves, PVeRA."""
    b, d, a, p = f"{name}_lambda_b", f"{name}_lambda_d", f"{name}_A", f"{name}_B"

    def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
        rank = rank_of(tensors, d, 0) // halves
        found = checked(tensors, {b: (spec.out_features,), d: (halves * rank,)})
        for shared, shape in ((a, (halves * rank, spec.fan_in)), (p, (spec.out_features, rank))):
            if shared in tensors:
                given = shape_of(tensors[shared])
                if len(given) != 2 or any(own < need for own, need in zip(given, shape, strict=True)) or not rank:
                    raise AdapterError(f"{shared} has shape {given}, expected at least {shape}")
                found[shared] = tensors[shared]
        return found

    def init(
        spec: LayerSpec, config: VeRAConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        size = halves * config.rank
        if config.init:
            return {b: torch.zeros(spec.out_features), d: torch.full((size,), float(config.d_initial))}
        return {b: torch.ones(spec.out_features), d: torch.randn(size, generator=generator)}

    def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
        if not all(a in layer.tensors and p in layer.tensors for layer in layers.values()):
            layers = _with_projections(layers)
        return unified(layers, (a, p))

    def _with_projections(layers: Mapping[str, Unfinished]) -> Mapping[str, Unfinished]:
        first = next(iter(layers.values()))
        rank = first.tensors[d].shape[0]
        rows, columns = max(x.spec.out_features for x in layers.values()), max(x.spec.fan_in for x in layers.values())
        device, generator = first.tensors[d].device, torch.Generator().manual_seed(int(first.settings["seed"]))
        down, up = torch.empty(rank, columns, device="meta"), torch.empty(rows, rank // halves, device="meta")
        if device.type != "meta":
            # Kaiming-uniform for the gain of a ReLU.
            down, up = (
                torch.empty(shape_of(t)).uniform_(-bound, bound, generator=generator).to(device)
                for t, bound in ((down, math.sqrt(6 / columns)), (up, math.sqrt(6 / (rank // halves))))
            )
        common = {a: down, p: up}
        return {path: layer._replace(tensors={**layer.tensors, **common}) for path, layer in layers.items()}

    def as_low_rank(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor] | None:
        return None if _SAMPLES in tensors else _factors(tensors, spec, 0)

    def _factors(tensors: Tensors, spec: LayerSpec, half: int) -> tuple[Tensor, Tensor]:
        rank = tensors[d].shape[0] // halves
        rows = slice(half * rank, (half + 1) * rank)
        down = tensors[a][rows, : spec.fan_in] * tensors[d][rows].unsqueeze(1)
        return flat(down, spec), tensors[p][: spec.out_features] * tensors[b].unsqueeze(1)

    def delta_weight(tensors: Tensors, spec: LayerSpec) -> Tensor:
        return spec.product(*_factors(tensors, spec, 0))

    def delta_output(
        tensors: Tensors, spec: LayerSpec, *, input: Tensor, gate: Tensor, onto: Tensor | None = None
    ) -> Tensor:
        if not torch.is_grad_enabled() or spec.groups > 1:
            return spec.low_rank(input, *_factors(tensors, spec, 0), gate, onto)
        # The vectors act on activations here, so that no gradients of the size of the projections are computed.
        hidden = spec.op(input, flat(tensors[a][:, : spec.fan_in].contiguous(), spec))
        hidden = hidden * spec.along_channels(tensors[d], hidden.ndim)
        if halves > 1:
            hidden, deviations = hidden.chunk(2, spec.channel_axis)
            if _SAMPLES in tensors:
                hidden = hidden + torch.randn_like(hidden) * (0.5 * deviations).exp()
        product = spec.expand(scaled(hidden, gate), tensors[p][: spec.out_features])
        product = product * spec.along_channels(tensors[b], product.ndim)
        return product if onto is None else add(product, onto)

    return AdapterType(
        name=name,
        tensors=(b, d, a, p),
        identified_by=frozenset({b, d}),
        config=config,
        settings={"seed": 0.0},
        fixed=frozenset({a, p}),
        shared=frozenset({a, p}),
        fit=fit,
        init=init,
        complete=complete,
        as_low_rank=as_low_rank,
        delta_weight=delta_weight,
        delta_output=delta_output,
        in_training=(lambda tensors: {**tensors, _SAMPLES: tensors[d]}) if halves > 1 else (lambda tensors: tensors),
    )


VERA: tuple[AdapterType, ...] = (_vera("vera", VeRAConfig, 1), _vera("pvera", PVeRAConfig, 2))
