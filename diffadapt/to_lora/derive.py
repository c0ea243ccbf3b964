"""Conversion of any adapters into one plain LoRA, exact if their change has low rank, otherwise as close as possible.

The change of a layer is `W' - W` of `compose.weight`, as a matrix of shape (out, in / groups x kernel). Among all
matrices of rank r, its truncated singular value decomposition is the closest in the Frobenius norm (Eckart and Young,
1936).

| change | decomposition |
|---|---|
| known as factors (LoRA, LoHa, some LoKr, sums of these) | the factors as given, or truncated by QR and a small SVD |
| small, or grouped | SVD |
| large | randomised SVD with power iterations: Halko, Martinsson and Tropp, arXiv 0909.4061, 4.4 and 5.1 |

A grouped convolution is a batch of such matrices, one per group, all truncated to the same rank. This is PEFT's layout
of a LoRA on such a layer. "Rank" here means the rank of one group; the LoRA has `rank x groups` rows.

Everything is computed in float64 on a CPU, elsewhere in float32 (float64 for float64 adapters). Random numbers come
from a separate generator, so the same adapters always yield the same LoRA.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError, naming
from diffadapt.progress import with_progress
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.attach import attach_, detach_
from diffadapt.runtime.bank import bank_of
from diffadapt.to_lora.change import Change, Sources, WeightedLayer, change_of
from diffadapt.to_lora.factors import Factors
from diffadapt.to_lora.report import Conversion, ConvertedLayer
from diffadapt.to_lora.truncation import Approximation, check_limits, truncate
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.lora import LORA

Maker: TypeAlias = Callable[[Sequence[WeightedLayer]], tuple[Change, Approximation]]
"""A function of the adapter layers on one layer: returns the requested change, and the factors that stand for it."""


def conversion(rank: int | None, energy: float | None) -> Maker:
    """Return the maker of a LoRA that does what the adapters do together according to `compose.weight`.

    Without `rank` and `energy` the LoRA is exact, and the maker raises `AdapterError` for a layer where no exact LoRA
    is smaller than the weight.

    Args:
        rank: the largest rank of a layer; `None` for no limit.
        energy: share of the squared Frobenius norm, in (0, 1]. Each layer gets the smallest rank that keeps it.

    Raises:
        AdapterError: `rank` or `energy` is out of range.
    """
    check_limits(rank, energy)

    def make(layers: Sequence[WeightedLayer]) -> tuple[Change, Approximation]:
        change = change_of(layers)
        return change, truncate(change, rank, energy)

    return make


@torch.no_grad()
def derive_(
    models: Mapping[str, nn.Module],
    name: str,
    strengths: Mapping[str, Mapping[str, float | Sequence[float]]],
    maker: Callable[[Sources], Maker],
) -> Conversion:
    """Make a LoRA from adapters, layer by layer, and attach it to the models, inactive.

    Args:
        models: component -> model.
        name: name of the new adapter.
        strengths: adapter -> component -> a strength, or one per layer; a layer with strength 0 does not take part.
        maker: returns the function that makes the layers.

    Returns:
        The report on the LoRA.

    Raises:
        AdapterError: a layer cannot be converted (the error names it), or no layer is changed. Nothing is attached
            then.
    """
    sources = _sources(models, strengths)
    loras, rows = stored_loras(sources, maker(sources))
    adapters = {
        component: Adapter(
            {
                path: AdapterLayer(LORA, spec, tensors, alpha=float(tensors["lora_down"].shape[0]))
                for path, (spec, tensors) in found.items()
            }
        )
        for component, found in loras.items()
    }
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
    return Conversion(name, rows)


def _sources(
    models: Mapping[str, nn.Module], strengths: Mapping[str, Mapping[str, float | Sequence[float]]]
) -> Sources:
    """Return the adapter layers with a strength other than 0."""
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


def stored_loras(
    sources: Sources, make: Maker
) -> tuple[dict[str, dict[str, tuple[LayerSpec, dict[str, Tensor]]]], tuple[ConvertedLayer, ...]]:
    """Return the LoRA of every layer, with the scale 1, and the report on all of them.

    Args:
        sources: the adapter layers on each layer.
        make: the function that makes the layers.

    Returns:
        component -> module path -> geometry and tensors, without layers whose change is zero; and the report.

    Raises:
        AdapterError: a layer cannot be converted. The error names it.
    """
    found: dict[str, dict[str, tuple[LayerSpec, dict[str, Tensor]]]] = {}
    rows: list[ConvertedLayer] = []
    for component, paths in sources.items():
        for path, layers in with_progress(paths.items(), f"converting {component}"):
            where = f"{component}.{path}"
            with naming(where):
                change, approximation = make(layers)
                types = tuple(sorted({layer.adapter_layer.adapter_type.name for layer in layers}))
                tensors, row = stored_lora(where, types, change, approximation)
            rows.append(row)
            if tensors is not None:
                found.setdefault(component, {})[path] = change.spec, tensors
    return found, tuple(rows)


def stored_lora(
    where: str, types: tuple[str, ...], change: Change, approximation: Approximation
) -> tuple[dict[str, Tensor] | None, ConvertedLayer]:
    """Return the tensors of a LoRA with the scale 1 in the dtype of the change, and the report on it.

    Args:
        where: component and module path, for the report.
        types: the adapter types that the change comes from, for the report.
        change: the change that is wanted.
        approximation: the factors that stand for it.

    Returns:
        `None` for the tensors if the change is zero.

    Raises:
        AdapterError: a LoRA cannot hold the change, or its dtype cannot.
    """
    (factors, exact), spec = approximation, change.spec
    if change.bias is not None and spec.kind == "embedding":
        raise AdapterError("the bias changes, but a LoRA on an embedding has no bias")
    if not factors.rank and change.bias is None:
        return None, ConvertedLayer(
            where, types, 0, exact, change.distance(factors) / (change.norm or 1.0), change.norm
        )
    if not factors.rank:
        # Only the bias changes, but a LoRA needs a rank.
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
    rounded = Factors(*(stored[n].to(f).view_as(f) for n, f in zip(("lora_up", "lora_down"), factors, strict=True)))
    error = change.distance(rounded) / (change.norm or 1.0)
    return stored, ConvertedLayer(where, types, factors.rank, exact, error, change.norm)
