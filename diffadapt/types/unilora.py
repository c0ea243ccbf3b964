"""UniLora: every element of the factors of a LoRA is one of a few trained numbers, which all layers share.

Li et al., "Uni-LoRA: One Vector is All You Need", arXiv 2506.00799, as in PEFT 0.21.2 `tuners/unilora/model.py`. With
theta the trained vector, `A = theta[indices_A] * scales_A`, and B in the same way. The scale of an element is the root
of how often the adapter uses its number, inverted. There is no alpha. The indices follow from a seed and all layers.

| tensor | shape |
|---|---|
| `unilora_theta_d`, shared | (length) |
| `unilora_indices_A`, `unilora_scales_A`, not trained | (rank, in x kernel) |
| `unilora_indices_B`, `unilora_scales_B`, not trained | (out, rank) |
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors, Unfinished
from diffadapt.types.config import AdapterConfig, refuse_unless_whole
from diffadapt.types.formulas import by_factors, checked, flat, rank_of, unified
from diffadapt.types.layer_spec import LayerSpec

_THETA = "unilora_theta_d"
_INDICES, _SCALES = ("unilora_indices_A", "unilora_indices_B"), ("unilora_scales_A", "unilora_scales_B")


@dataclass(frozen=True, kw_only=True)
class UniLoraConfig(AdapterConfig):
    """Settings of a new UniLora (Li et al., arXiv 2506.00799).

    Attributes:
        rank: the rank of the factors, the same for all layers.
        length: the number of trained numbers (`theta_d_length` in PEFT).
        seed: the seed of the indices (`proj_seed` in PEFT).
        init: with `True`, the factors that lead to the output use the second half of the numbers, which starts at zero,
            and the others the first half. With "peft", all factors use all numbers, as in PEFT, which has an effect
            from the start. With `False` it has one, too.
    """

    rank: int = 4
    length: int = 256
    seed: int = 42

    def _inits(self) -> tuple[bool | str, ...]:
        return (True, "peft", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unless_whole("rank", self.rank)
        refuse_unless_whole("length", self.length, least=2)
        refuse_unless_whole("seed", self.seed, least=0)

    @property
    def settings(self) -> dict[str, float]:
        """The rank, the seed, and whether the two factors share numbers."""
        return {"rank": float(self.rank), "seed": float(self.seed), "split": float(self.init is True)}


def fit(tensors: Tensors, spec: LayerSpec) -> dict[str, Tensor]:
    """Check the tensors of a file and return them in the shapes of the table above."""
    theta = tensors.get(_THETA)
    if theta is None or theta.ndim != 1:
        raise AdapterError(f"{_THETA} missing, only {', '.join(sorted(tensors))} found")
    rank = rank_of(tensors, _INDICES[0], 0)
    shapes = ((rank, spec.fan_in), (spec.out_features, rank))
    needed = {name: shape for names in (_INDICES, _SCALES) for name, shape in zip(names, shapes, strict=True)}
    if tensors.keys().isdisjoint(needed):
        return {_THETA: theta}
    found = checked(tensors, needed)
    for name in _INDICES:
        places = found[name]
        if not places.is_meta and not bool(((places >= 0) & (places < theta.shape[0])).all()):
            raise AdapterError(f"{name} are not all below {theta.shape[0]}, the length of {_THETA}")
    return {_THETA: theta, **found}


def init(
    spec: LayerSpec, config: UniLoraConfig, *, generator: torch.Generator, weight: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Return the trained numbers. All layers get those of the first one; see `complete`."""
    bound = 0.02 if config.init else 1.0
    theta = torch.empty(config.length).uniform_(-bound, bound, generator=torch.Generator().manual_seed(config.seed))
    if config.init is True:
        theta[config.length // 2 :] = 0
    return {_THETA: theta}


def complete(layers: Mapping[str, Unfinished]) -> Mapping[str, Tensors]:
    """Return the tensors with the indices and scales, drawn for all layers together."""
    if not all(_INDICES[0] in layer.tensors for layer in layers.values()):
        layers = _with_indices(layers)
    return unified(layers, (_THETA,))


def factors(tensors: Tensors, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Return `down` and `up`."""
    theta = tensors[_THETA]
    down, up = (theta[tensors[i].long()] * tensors[s] for i, s in zip(_INDICES, _SCALES, strict=True))
    return flat(down, spec), up


def _with_indices(layers: Mapping[str, Unfinished]) -> Mapping[str, Unfinished]:
    """Return the layers with indices that use every number equally often, in the order in which PEFT deals them out."""
    first = next(iter(layers.values()))
    theta, rank, split = first.tensors[_THETA], int(first.settings["rank"]), bool(first.settings["split"])
    length, device = theta.shape[0], theta.device
    shapes = {path: ((rank, x.spec.fan_in), (x.spec.out_features, rank)) for path, x in layers.items()}
    pools = ((0, length // 2), (length // 2, length)) if split else ((0, length),)
    found: dict[str, dict[str, Tensor]] = {path: {} for path in layers}
    for number, (start, stop) in enumerate(pools):
        sides = (number,) if split else (0, 1)
        total = sum(shape[side][0] * shape[side][1] for shape in shapes.values() for side in sides)
        if theta.is_meta:
            indices = counts = None
        else:
            dealt = start + _dealt(total, stop - start, int(first.settings["seed"]) + number)
            indices, counts = dealt, torch.bincount(dealt, minlength=length)
        position = 0
        for path, shape in shapes.items():
            for side in sides:
                size = shape[side][0] * shape[side][1]
                if indices is None or counts is None:
                    found[path][_INDICES[side]] = torch.empty(shape[side], dtype=torch.int64, device=device)
                    found[path][_SCALES[side]] = torch.empty(shape[side], device=device)
                    continue
                own = indices[position : position + size].view(shape[side])
                position += size
                found[path][_INDICES[side]] = own.to(device)
                found[path][_SCALES[side]] = counts.float().clamp_min(1).rsqrt()[own].to(device)
    return {path: layer._replace(tensors={**layer.tensors, **found[path]}) for path, layer in layers.items()}


def _dealt(count: int, length: int, seed: int) -> Tensor:
    """Return `count` shuffled indices below `length`, each as often as the others or once more."""
    generator = numpy.random.default_rng(seed)
    data: Any = numpy.repeat(numpy.arange(length), count // length)
    if count % length:
        data = numpy.concatenate([data, generator.choice(length, size=count % length, replace=False)])
    generator.shuffle(data)
    return torch.as_tensor(data, dtype=torch.int64)


UNILORA = AdapterType(
    name="unilora",
    tensors=(_THETA, *_INDICES, *_SCALES),
    identified_by=frozenset({_THETA}),
    config=UniLoraConfig,
    settings={"rank": 4.0, "seed": 42.0, "split": 0.0},
    fixed=frozenset({*_INDICES, *_SCALES}),
    shared=frozenset({_THETA}),
    fit=fit,
    init=init,
    complete=complete,
    **by_factors(factors),
)
