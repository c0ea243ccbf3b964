"""Any adapters as one plain LoRA: exactly where their change has low rank, else as near as a rank allows.

The change of a layer is `W' - W` of `compose.weight`, as a matrix of shape (out, in / groups x kernel). Of all matrices
of rank r its truncated singular value decomposition is the nearest in the Frobenius norm (Eckart and Young, 1936).

| change | decomposition |
|---|---|
| given as factors (LoRA, LoHa, some LoKr, sums of such) | the factors as they are; to cut them, QR and a small SVD |
| small, or grouped | SVD |
| large | randomised SVD with power iterations: Halko, Martinsson and Tropp, arXiv 0909.4061, 4.4 and 5.1 |

A grouped convolution is a batch of such matrices, one per group, all cut to the same rank. That is the layout PEFT has
for LoRA on it, and here "rank" means that of one group; the LoRA has `rank x groups` rows.

On a CPU everything is computed in float64, elsewhere in float32 (float64 for float64 adapters). Random numbers come
from a generator of their own: the same adapters always give the same LoRA.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import nn

from diffadapt.errors import AdapterError, naming
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_, detach_
from diffadapt.runtime.bank import bank_of
from diffadapt.to_lora.change import Change, Sources, WeightedLayer, change_of
from diffadapt.to_lora.cut import Cut, truncate
from diffadapt.to_lora.factors import Factors
from diffadapt.to_lora.report import Conversion, ConvertedLayer
from diffadapt.types.lora import LORA

Maker: TypeAlias = Callable[[Sequence[WeightedLayer]], tuple[Change, Cut]]
"""Of the adapters on one layer: the change that is wanted, and the factors that stand for it."""


def check_limits(rank: object, energy: object) -> None:
    """Refuse what is no rank (at least 1) and no share of the energy (above 0, at most 1); `None` is no limit."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise AdapterError(f"rank is {rank!r}, expected a number of at least 1")
    if energy is not None and (isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise AdapterError(f"energy is {energy!r}, expected 0 < energy <= 1")


def conversion(rank: int | None, energy: float | None) -> Maker:
    """What all adapters on a layer do together, as `compose.weight` has it, as one LoRA.

    Args:
        rank: the most a layer gets.
        energy: every layer gets the smallest rank that keeps this share of the squared Frobenius norm. Without
            either, the LoRA is exact, or `AdapterError` is raised where none is smaller than the weight.
    """
    check_limits(rank, energy)

    def make(parts: Sequence[WeightedLayer]) -> tuple[Change, Cut]:
        change = change_of(parts)
        return change, truncate(change, rank, energy)

    return make


@torch.no_grad()
def derive_(
    models: Mapping[str, nn.Module],
    name: str,
    strengths: Mapping[str, Mapping[str, float | Sequence[float]]],
    maker: Callable[[Sources], Maker],
) -> Conversion:
    """Make a LoRA of adapters, layer by layer, and attach it to the models, inactive.

    Args:
        strengths: adapter -> component -> a strength, or one per layer; a layer with 0 does not take part.
        maker: gives what makes one layer.

    Raises:
        AdapterError: a layer cannot be turned into a LoRA (the error names it). Nothing is attached then.
    """
    adapters: dict[str, Adapter] = {}
    rows: list[ConvertedLayer] = []
    sources = _sources(models, strengths)
    make = maker(sources)
    for component, paths in sources.items():
        layers: dict[str, AdapterLayer] = {}
        for path, parts in paths.items():
            where = f"{component}.{path}"
            with naming(where):
                layer, row = _built(where, parts, make)
            rows.append(row)
            if layer is not None:
                layers[path] = layer
        if layers:
            adapters[component] = Adapter(layers)
    if not adapters:
        raise AdapterError(f"the adapters change no layer at these strengths, so there is no LoRA {name!r} to make")
    try:
        for component, adapter in adapters.items():
            bank = bank_of(models[component])
            assert bank is not None
            attach_(models[component], name, adapter, bank.hosts)
    except BaseException:
        for component in adapters:
            detach_(models[component], name)
        raise
    return Conversion(name, tuple(rows))


def _sources(
    models: Mapping[str, nn.Module], strengths: Mapping[str, Mapping[str, float | Sequence[float]]]
) -> Sources:
    sources: dict[str, dict[str, list[WeightedLayer]]] = {}
    for component, model in models.items():
        bank = bank_of(model)
        if bank is None:
            continue
        originals = {key: way.restored for key, way in bank.ways.items()}
        for name, by_component in strengths.items():
            layers = bank.adapters[name].layers if name in bank.adapters else {}
            given = by_component.get(component, 0.0)
            each = given if isinstance(given, Sequence) else [given] * len(layers)
            for (path, layer), strength in zip(layers.items(), each, strict=True):
                if strength:
                    sources.setdefault(component, {}).setdefault(path, []).append(
                        WeightedLayer(layer, strength, originals)
                    )
    return sources


def _built(where: str, parts: Sequence[WeightedLayer], make: Maker) -> tuple[AdapterLayer | None, ConvertedLayer]:
    """The LoRA of one layer, its scale 1, and the account of it."""
    change, (factors, exact) = make(parts)
    spec, types = change.spec, tuple(sorted({part.layer.adapter_type.name for part in parts}))
    if change.bias is not None and spec.kind == "embedding":
        raise AdapterError("the bias is changed, which a LoRA of an embedding cannot")
    if not factors.rank and change.bias is None:
        return None, ConvertedLayer(
            where, types, 0, exact, change.distance(factors) / (change.norm or 1.0), change.norm
        )
    if not factors.rank:
        factors = Factors(
            factors.up.new_zeros(*factors.up.shape[:2], 1), factors.down.new_zeros(spec.groups, 1, spec.fan_in)
        )
    tensors = {
        "lora_down": factors.down.reshape(-1, *spec.weight_shape[1:]),
        "lora_up": factors.up.reshape(spec.out_features, factors.rank),
        **({} if change.bias is None else {"lora_bias": change.bias}),
    }
    stored = {name: tensor.to(change.dtype).contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in stored.values()):
        raise AdapterError(f"the LoRA would have values that {change.dtype} cannot hold")
    layer = AdapterLayer(LORA, spec, stored, alpha=float(stored["lora_down"].shape[0]))
    rounded = Factors(*(stored[n].to(f).view_as(f) for n, f in zip(("lora_up", "lora_down"), factors, strict=True)))
    error = change.distance(rounded) / (change.norm or 1.0)
    return layer, ConvertedLayer(where, types, factors.rank, exact, error, change.norm)
