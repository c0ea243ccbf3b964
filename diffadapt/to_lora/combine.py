"""Weighted merging of several adapters into one LoRA.

With the changes D of a layer's weight at strength 1, weights w, and LoRA factors D = B A:

| method | weight change of the result | paper |
|---|---|---|
| cat | sum w D, exactly: the factors are concatenated | |
| svd | sum w D, truncated to a rank | |
| linear | (sum sqrt(w) B) (sum sqrt(w) A): keeps the rank of the factors, and adds cross terms B_i A_j | |
| magnitude_prune | sum w P(D), where P keeps the largest elements | |
| ties | mean of w P(D) over those P(D) that have the elected sign, element by element | arXiv 2306.01708 |
| dare_linear | sum w R(D), where R keeps random elements and divides them by the density | arXiv 2311.03099 |
| dare_ties | like ties, with R instead of P | both |

If all adapters are LoRA of equal rank on the layers they share, and neither `rank` nor `energy` is given, the last four
act on the factors themselves, as `linear` does. Otherwise they act on the changes, and the result is truncated to
`rank`. As for svd, `rank` defaults to the largest rank that an adapter has on the layer.

The semantics are those of PEFT 0.21 (`add_weighted_adapter`): signs are elected before weighting; of a negative weight
the root of the absolute value is taken, and A gets its sign; a layer that some adapters lack is made from the others.
An adapter whose weight on a layer is 0 takes no part there. A change of the bias is one more tensor, merged like the
change of the weight.
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
from diffadapt.to_lora.derive import Maker
from diffadapt.to_lora.factors import Factors, joined
from diffadapt.to_lora.truncation import Approximation, check_limits, truncate
from diffadapt.types.lora import LORA

Method: TypeAlias = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
Sign: TypeAlias = Literal["total", "frequency"]

_SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_ELECTING = ("ties", "dare_ties")
_RANDOM = ("dare_linear", "dare_ties")
_FIXED_RANK = ("linear", "cat")


@dataclass(frozen=True)
class Combination:
    """A method of merging adapters into one LoRA, with its options. Options without effect on the method are refused.

    Attributes:
        method: "linear", "cat", "svd", "ties", "dare_linear", "dare_ties" or "magnitude_prune".
        density: share of the elements to keep, in (0, 1].
        rank: the largest rank of a layer of the result.
        energy: share of the squared Frobenius norm to keep, in (0, 1]; each layer gets the smallest rank that does.
        generator: draws the elements to keep, layer by layer; defaults to a new generator with the seed 0.
        sign: how signs are elected: by the sum of the values ("total"), or by the majority of adapters ("frequency").

    Raises:
        AdapterError: an option is out of range, missing, or without effect on the method.
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
            raise AdapterError(f"method={method!r} needs density=, the share of the elements to keep")
        if isinstance(density, bool) or not 0 < density <= 1:
            raise AdapterError(f"density is {density!r}, expected 0 < density <= 1")

    def maker(self, sources: Sources) -> Maker:
        """Return the function that combines the adapter layers on one layer of `sources`."""
        generator = self.generator or torch.Generator().manual_seed(0)
        all_layers = [layers for paths in sources.values() for layers in paths.values()]
        on_factors = self.method == "linear" or (
            self.method in _SPARSE and self.rank is None and self.energy is None and all(map(_share_rank, all_layers))
        )

        def make(layers: Sequence[WeightedLayer]) -> tuple[Change, Approximation]:
            changes = [change_of([replace(layer, strength=1.0)]) for layer in layers]
            weights = [layer.strength for layer in layers]
            biases = {i: change.bias for i, change in enumerate(changes) if change.bias is not None}
            if on_factors:
                factors = self._combined_factors(layers, changes, generator)
                value = _sum(changes, weights) if self.method == "linear" else factors
            else:
                factors = None
                value = self._combined_change(layers, changes, generator)
            change = Change(
                changes[0].spec,
                value,
                self._merged([*biases.values()], [weights[i] for i in biases], generator) if biases else None,
                reduce(torch.promote_types, (change.dtype for change in changes)),
                sum(abs(weight) * (c.reference + c.norm) for c, weight in zip(changes, weights, strict=True)),
            )
            if factors is not None:
                # Without limits nothing is lost, but a product that is zero is recognised.
                kept = truncate(replace(change, value=factors), None, None).factors
                return change, Approximation(kept, self.method != "linear" or len(layers) == 1)
            if self.method == "cat":
                return change, truncate(change, None, None)
            return change, truncate(change, self._rank(changes), self.energy)

        return make

    def _combined_change(
        self, layers: Sequence[WeightedLayer], changes: Sequence[Change], generator: torch.Generator
    ) -> Factors | Tensor:
        """Return the combined change of one layer."""
        weights = [layer.strength for layer in layers]
        if self.method in _SPARSE:
            return self._merged([change.dense for change in changes], weights, generator)
        for layer, change in zip(layers, changes, strict=True):
            if self.method == "cat" and change.factors is None:
                name = layer.adapter_layer.adapter_type.name
                raise AdapterError(f"this {name} has no factors to concatenate; use method='svd'")
        return _sum(changes, weights)

    def _combined_factors(
        self, layers: Sequence[WeightedLayer], changes: Sequence[Change], generator: torch.Generator
    ) -> Factors:
        """Return the combined `up` and `down` factors, each weighted with the square root of the weight."""
        pairs = [_lora_factors(layer, change) for layer, change in zip(layers, changes, strict=True)]
        if not _share_rank(layers):
            ranks = ", ".join(str(pair.rank) for pair in pairs)
            raise AdapterError(f"method={self.method!r} needs equal ranks, found {ranks}; use 'cat' or 'svd'")
        weights = [layer.strength * layer.adapter_layer.scale for layer in layers]
        roots = [abs(weight) ** 0.5 for weight in weights]
        signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
        down = self._merged([pair.down for pair in pairs], signed, generator)
        return Factors(self._merged([pair.up for pair in pairs], roots, generator), down)

    def _rank(self, changes: Sequence[Change]) -> int | None:
        """Return the largest rank of the result: the one requested, or the largest among the changes."""
        if self.rank is not None or self.energy is not None:
            return self.rank
        ranks = [change.factors.rank for change in changes if change.factors is not None]
        if len(ranks) < len(changes):
            raise AdapterError("an adapter has no low-rank form here to take the rank from; pass rank= or energy=")
        return max(ranks)

    def _merged(self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator) -> Tensor:
        """Merge tensors of the same shape, one per adapter, into one."""
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


def _share_rank(layers: Sequence[WeightedLayer]) -> bool:
    """Return whether the adapters on one layer are LoRA of equal rank."""
    adapter_layers = [layer.adapter_layer for layer in layers]
    return (
        all(layer.adapter_type is LORA for layer in adapter_layers)
        and len({layer.tensors["lora_up"].shape for layer in adapter_layers}) == 1
    )


def _sum(changes: Sequence[Change], weights: Sequence[float]) -> Factors | Tensor:
    """Return the weighted sum of changes, as factors if all of them are factors."""
    pairs = [change.factors for change in changes if change.factors is not None]
    if len(pairs) == len(changes):
        return joined([Factors(pair.up * weight, pair.down) for pair, weight in zip(pairs, weights, strict=True)])
    return torch.stack([change.dense * weight for change, weight in zip(changes, weights, strict=True)]).sum(0)


def _lora_factors(layer: WeightedLayer, change: Change) -> Factors:
    """Return the factors of a LoRA without its scale."""
    adapter_layer = layer.adapter_layer
    if adapter_layer.adapter_type is not LORA or change.factors is None:
        raise AdapterError(f"the method needs LoRA, found {adapter_layer.adapter_type.name}; use method='svd'")
    return Factors(change.factors.up / adapter_layer.scale, change.factors.down)


def _pruned(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with only its largest elements by magnitude; the others are zero."""
    if density == 1:
        return tensor
    kept = max(1, int(density * tensor.numel()))
    flat = tensor.flatten()
    largest = flat.abs().topk(kept).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(tensor)


def _thinned(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the tensor with only random elements, scaled to keep its expectation; the others are zero."""
    chances = torch.full(tensor.shape, density, dtype=torch.float32, device=generator.device)
    return tensor * torch.bernoulli(chances, generator=generator).to(tensor) / density
