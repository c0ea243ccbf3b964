"""Weighted merging of several adapters into one LoRA.

With changes D of the layer's weight at strength 1, weights w, and LoRA factors D = B A:

| method | weight change of the result | paper |
|---|---|---|
| cat | sum w D, exactly: the factors side by side | |
| svd | sum w D, cut to a rank | |
| linear | (sum sqrt(w) B) (sum sqrt(w) A): the factors' rank stays, and terms B_i A_j come in | |
| magnitude_prune | sum w P(D), where P keeps the largest elements | |
| ties | mean of w P(D) over those P(D) that have the elected sign, element by element | arXiv 2306.01708 |
| dare_linear | sum w R(D), where R keeps random elements and divides them by the density | arXiv 2311.03099 |
| dare_ties | as ties, with R in place of P | both |

The last four act on the factors themselves, as `linear` does, where all adapters are LoRA, of equal rank on the layers
they share, and neither `rank` nor `energy` is given. Otherwise they act on the changes, which are then cut to `rank`;
by default, as for svd, to the largest rank that an adapter has on the layer.

Semantics are those of PEFT 0.21 (`add_weighted_adapter`): signs are elected before weighting, a negative weight takes
its square root from the absolute value and goes to A with its sign, and a layer that some adapters lack is made of the
others. An adapter whose weight on a layer is 0 takes no part there. A change of the bias is one more tensor, merged
like the change of the weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.to_lora.change import Change, Sources, WeightedLayer, change_of
from diffadapt.to_lora.cut import Cut, truncate
from diffadapt.to_lora.derive import Maker, check_limits
from diffadapt.to_lora.factors import Factors, joined
from diffadapt.types.lora import LORA

Method: TypeAlias = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Sign: TypeAlias = Literal["total", "frequency"]

_SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_ELECTING = ("ties", "dare_ties")
_RANDOM = ("dare_linear", "dare_ties")
_FIXED_RANK = ("linear", "cat")


@dataclass(frozen=True)
class Combination:
    """How to combine; what has no effect with the method is refused.

    Attributes:
        density: share of the elements that is kept, above 0 and at most 1.
        rank: the most a layer of the result gets.
        energy: share of the squared Frobenius norm that is kept, see `lowrank.conversion`.
        generator: draws what is kept, layer by layer; default a fresh one seeded with 0.
        sign: the elected sign is that of the sum ("total"), or the one that more adapters have ("frequency").
    """

    method: Method = "svd"
    density: float | None = None
    rank: int | None = None
    energy: float | None = None
    generator: torch.Generator | None = None
    sign: Sign = "total"

    def __post_init__(self) -> None:
        method, density = self.method, self.density
        if method not in get_args(Method):
            raise AdapterError(f"method is {method!r}, expected one of {', '.join(get_args(Method))}")
        if self.sign not in get_args(Sign):
            raise AdapterError(f"sign is {self.sign!r}, expected one of {', '.join(get_args(Sign))}")
        check_limits(self.rank, self.energy)
        idle = {
            "density": density is not None and method not in _SPARSE,
            "rank": self.rank is not None and method in _FIXED_RANK,
            "energy": self.energy is not None and method in _FIXED_RANK,
            "generator": self.generator is not None and method not in _RANDOM,
            "sign": self.sign != "total" and method not in _ELECTING,
        }
        for name, is_idle in idle.items():
            if is_idle:
                raise AdapterError(f"{name} has no effect with method={method!r}")
        if method not in _SPARSE:
            return
        if density is None:
            raise AdapterError(f"method={method!r} needs density=, the share of the elements that is kept")
        if isinstance(density, bool) or not 0 < density <= 1:
            raise AdapterError(f"density is {density!r}, expected 0 < density <= 1")

    def maker(self, sources: Sources) -> Maker:
        """What makes one layer of the combination of `sources`."""
        generator = self.generator or torch.Generator().manual_seed(0)
        layers = [parts for paths in sources.values() for parts in paths.values()]
        on_factors = self.method == "linear" or (
            self.method in _SPARSE and self.rank is None and self.energy is None and all(map(_shares_rank, layers))
        )

        def make(parts: Sequence[WeightedLayer]) -> tuple[Change, Cut]:
            changes = [change_of([replace(part, strength=1.0)]) for part in parts]
            weights = [part.strength for part in parts]
            biases = {i: change.bias for i, change in enumerate(changes) if change.bias is not None}
            if on_factors:
                factors = self._factors(parts, changes, generator)
                whole = _sum(changes, weights) if self.method == "linear" else factors
            else:
                factors = None
                whole = self._whole(parts, changes, generator)
            change = Change(
                changes[0].spec,
                whole,
                self._merged([*biases.values()], [weights[i] for i in biases], generator) if biases else None,
                reduce(torch.promote_types, (change.dtype for change in changes)),
                sum(abs(weight) * (c.reference + c.norm) for c, weight in zip(changes, weights, strict=True)),
            )
            if factors is not None:
                # Nothing is cut, but a product that is zero has to be seen.
                made = truncate(replace(change, whole=factors), None, None).factors
                return change, Cut(made, self.method != "linear" or len(parts) == 1)
            if self.method == "cat":
                return change, truncate(change, None, None)
            return change, truncate(change, self._rank(changes), self.energy)

        return make

    def _whole(
        self, parts: Sequence[WeightedLayer], changes: Sequence[Change], generator: torch.Generator
    ) -> Factors | Tensor:
        """The combined change of one layer."""
        weights = [part.strength for part in parts]
        if self.method in _SPARSE:
            return self._merged([change.dense for change in changes], weights, generator)
        for part, change in zip(parts, changes, strict=True):
            if self.method == "cat" and change.factors is None:
                raise AdapterError(
                    f"this {part.layer.adapter_type.name} has no factors to put side by side; use method='svd'"
                )
        return _sum(changes, weights)

    def _factors(
        self, parts: Sequence[WeightedLayer], changes: Sequence[Change], generator: torch.Generator
    ) -> Factors:
        """Factors that are combined one by one, with the square root of the weight on each side."""
        pairs = [_lora_factors(part, change) for part, change in zip(parts, changes, strict=True)]
        if not _shares_rank(parts):
            ranks = ", ".join(str(pair.rank) for pair in pairs)
            raise AdapterError(f"method={self.method!r} needs equal ranks, found {ranks}; use 'cat' or 'svd'")
        weights = [part.strength * part.layer.scale for part in parts]
        roots = [abs(weight) ** 0.5 for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        down = self._merged([pair.down for pair in pairs], signed, generator)
        return Factors(self._merged([pair.up for pair in pairs], roots, generator), down)

    def _rank(self, changes: Sequence[Change]) -> int | None:
        """What the result is cut to: as asked for, or the largest there is."""
        if self.rank is not None or self.energy is not None:
            return self.rank
        ranks = [change.factors.rank for change in changes if change.factors is not None]
        if len(ranks) < len(changes):
            raise AdapterError("an adapter has no low-rank form here that could say the rank; pass rank= or energy=")
        return max(ranks)

    def _merged(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """One tensor from one per adapter, of the same shape."""
        density = self.density or 1.0
        if self.method in _RANDOM:
            tensors = [_thinned(tensor, density, generator) for tensor in tensors]
        elif self.method in _SPARSE:
            tensors = [_pruned(tensor, density) for tensor in tensors]
        stacked = torch.stack(list(tensors))
        weighted = stacked * stacked.new_tensor(weights).view(-1, *(1,) * (stacked.ndim - 1))
        if self.method not in _ELECTING:
            return weighted.sum(0)
        votes = stacked if self.sign == "total" else stacked.sign()
        agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def _shares_rank(parts: Sequence[WeightedLayer]) -> bool:
    """Whether the adapters on one layer are LoRA of equal rank."""
    return (
        all(p.layer.adapter_type is LORA for p in parts) and len({p.layer.tensors["lora_up"].shape for p in parts}) == 1
    )


def _sum(changes: Sequence[Change], weights: Sequence[float]) -> Factors | Tensor:
    """The weighted sum of changes, as factors if all are."""
    pairs = [change.factors for change in changes if change.factors is not None]
    if len(pairs) == len(changes):
        return joined([Factors(pair.up * weight, pair.down) for pair, weight in zip(pairs, weights, strict=True)])
    return torch.stack([change.dense * weight for change, weight in zip(changes, weights, strict=True)]).sum(0)


def _lora_factors(part: WeightedLayer, change: Change) -> Factors:
    """A LoRA's own factors, without its scale."""
    if part.layer.adapter_type is not LORA or change.factors is None:
        raise AdapterError(f"the method needs LoRA, found {part.layer.adapter_type.name}; use method='svd'")
    return Factors(change.factors.up / part.layer.scale, change.factors.down)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    """The largest elements by magnitude, the rest zero."""
    if density == 1:
        return tensor
    kept = max(1, int(density * tensor.numel()))
    flat = tensor.flatten()
    largest = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(tensor)


def _thinned(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Random elements, scaled so that the expectation stays; the rest zero."""
    chances = torch.full(tensor.shape, density, dtype=torch.float32, device=generator.device)
    return tensor * torch.bernoulli(chances, generator=generator).to(tensor) / density
