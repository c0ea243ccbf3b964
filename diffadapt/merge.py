"""Merge adapters into the weights of a model, and put every bit back.

The merged weight is that of `compose.weight`, computed in float32 (float64 for float64 weights) from the original one
and rounded once, however many adapters are merged. Weights are written in place: parameters stay the same objects,
compiled graphs stay valid.

Undoing is no subtraction, which rounding would make inexact. Either the originals are kept, or, in a few percent of
their memory, what a prediction from the merged weight gets wrong (`corrections`). The prediction solves `W' = F(W)` for
W in float64 by fixed-point steps `W <- W - (F(W) - W')`: one is enough for sums; rotations and factors are near one.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import PATCH_DELTA, Adapter, AdapterLayer
from diffadapt.attach import Bank, bank_of, refresh_
from diffadapt.corrections import Corrections
from diffadapt.errors import AdapterError
from diffadapt.hooks import FLOAT8, resting_tensor
from diffadapt.kind import Tensors

_STEPS = 8
_PIECE = 1 << 18


@dataclass(frozen=True)
class Compact:
    """How to get a base tensor back that is not kept.

    Attributes:
        paths: of the layers that have it, one after the other as they were merged.
        names: of the merged adapters.
        fixed: path and adapter -> what was prepared with the help of the original weight, which the merged one cannot
            give again (the norms of a DoRA).
    """

    tensor: Tensor
    paths: tuple[str, ...]
    names: tuple[str, ...]
    fixed: Mapping[tuple[str, str], Tensors]
    corrections: Corrections


def undo_bytes(small: Compact) -> int:
    """Memory that is kept to undo one change."""
    fixed = (tensor for tensors in small.fixed.values() for tensor in tensors.values())
    return small.corrections.nbytes + sum(tensor.nbytes for tensor in fixed)


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str], *, compact: bool = False) -> None:
    """Merge adapters `names`, at their present strengths, into every model that has them.

    Args:
        compact: keep what rounding lost instead of copies, where that is less.

    Raises:
        AdapterError: a weight is quantised or out of reach, a bias is missing, a result is not finite, or an adapter
            that is not merged would act on the weights of one that is. Nothing has been written then.
    """
    names = tuple(names)
    banks = {component: bank for component, model in models.items() if (bank := bank_of(model)) is not None}
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for component, bank in banks.items():
        merged = (*bank.merged, *names)
        refuse_mixture(component, bank.adapters, merged)
        expand_(bank)
        changes[component] = _changes(component, bank, merged)
    for component, bank in banks.items():
        kept = {id(tensor) for tensor, _ in bank.originals}
        groups = _groups(component, bank, (*bank.merged, *names)) if compact else {}
        for tensor, rounded in changes[component]:
            paths = groups.get(id(tensor), ())
            if id(tensor) in kept:
                tensor.copy_(rounded)
            elif paths and (small := _compacted(bank, tensor, rounded, paths, (*bank.merged, *names))):
                bank.compact.append(small)
                tensor.copy_(rounded)
            else:
                bank.originals.append((tensor, _exchanged_(tensor, rounded)))
        bank.merged = (*bank.merged, *(name for name in names if name in bank.adapters))
        refresh_(models[component])


@torch.no_grad()
def unmerge_(model: nn.Module) -> None:
    """Put back every weight that `merge_` changed, bit for bit; the adapters run beside the weights again."""
    bank = bank_of(model)
    if bank is None or not bank.merged:
        return
    for small in bank.compact:
        small.tensor.copy_(_restored(bank, small))
    bank.compact.clear()
    for tensor, original in bank.originals:
        tensor.copy_(original)
    bank.originals.clear()
    bank.merged = ()
    refresh_(model)


@torch.no_grad()
def expand_(bank: Bank) -> None:
    """Copies in the place of what is kept compactly, for what needs the originals themselves."""
    while bank.compact:
        small = bank.compact[-1]
        bank.originals.append((small.tensor, _restored(bank, small)))
        bank.compact.pop()


def refuse_mixture(component: str, adapters: Mapping[str, Adapter], merged: Collection[str]) -> None:
    """Raise `AdapterError` if an active adapter that multiplies weights would find them changed by a merged one.

    A sum of changes does not care which of them are in the weight already; a rotation or a scale does.
    """
    below = {path: name for name in merged if name in adapters for path in adapters[name].layers}
    for name, adapter in adapters.items() if below else ():
        for path, layer in adapter.layers.items() if adapter.active and name not in merged else ():
            if path in below and not layer.is_additive:
                raise AdapterError(
                    f"{component}.{path}: adapter {name!r} ({layer.kind.name}) multiplies the weight, which a merged "
                    f"{below[path]!r} changes; merge both in one call, or deactivate {name!r}"
                )


def _changes(component: str, bank: Bank, names: Collection[str]) -> list[tuple[Tensor, Tensor]]:
    """Base tensors, and what they become, from the originals; rounded as soon as they are known."""
    originals = {id(tensor): original for tensor, original in bank.originals}
    changes: list[tuple[Tensor, Tensor]] = []
    for paths in _groups(component, bank, names).values():
        total: Tensor | None = None
        for path in paths:
            host, where = bank.hosts[path], f"{component}.{path}"
            layers = list(_merged_layers(bank, path, names).values())
            if total is not None and not all(layer.is_additive for layer in layers):
                raise AdapterError(f"{where}: its weight is shared with another layer; keep it unmerged")
            tensor = _writable(host, where, "weight")
            base = layers[0].spec.to_stored(_wide(tensor, originals) if total is None else total)
            ready = [compose.wide(layer, base) for layer in layers]
            own = base.dtype != tensor.dtype or total is not None
            total = layers[0].spec.to_stored(compose.weight(ready, base, overwrite=own))
            if compose.changes_bias(ready, getattr(host, "bias", None) is not None):
                bias = _writable(host, where, "bias")
                changes.append((bias, _rounded(where, bias, compose.bias(ready, _wide(bias, originals)))))
        tensor = _writable(bank.hosts[paths[0]], paths[0], "weight")
        assert total is not None
        changes.append((tensor, _rounded(f"{component}.{paths[0]}", tensor, total)))
    return changes


def _groups(component: str, bank: Bank, names: Collection[str]) -> dict[int, list[str]]:
    """`id` of a weight -> the paths of the layers that have it."""
    sharing: dict[int, list[str]] = {}
    for path in dict.fromkeys(path for name in names if name in bank.adapters for path in bank.adapters[name].layers):
        sharing.setdefault(id(_writable(bank.hosts[path], f"{component}.{path}", "weight")), []).append(path)
    return sharing


def _compacted(
    bank: Bank, tensor: Tensor, rounded: Tensor, paths: Sequence[str], names: Sequence[str]
) -> Compact | None:
    """What restores `tensor` from `rounded`, unless that is more than a copy."""
    fixed: dict[tuple[str, str], Tensors] = {}
    for path in paths:
        for name, layer in _merged_layers(bank, path, names).items():
            bases = (layer.spec.to_stored(weight.detach().double()) for weight in (tensor, rounded))
            original, merged = (layer.prepared(lambda base=base: base, torch.float64) for base in bases)
            differ = {key for key in original if key != PATCH_DELTA and not torch.equal(original[key], merged[key])}
            if differ:
                fixed[path, name] = {key: original[key] for key in differ}
    predicted = _predicted(bank, rounded, paths, names, fixed)
    corrections = Corrections.between(predicted, tensor)
    small = Compact(tensor, tuple(paths), tuple(names), fixed, corrections)
    return small if undo_bytes(small) < tensor.nbytes else None


def _exchanged_(tensor: Tensor, other: Tensor) -> Tensor:
    """The content of `tensor`, which gets that of `other`; in the memory of `other` where that can be."""
    if not (tensor.is_contiguous() and other.is_contiguous()):
        content = tensor.detach().clone()
        tensor.copy_(other)
        return content
    for mine, its in zip(tensor.detach().view(-1).split(_PIECE), other.view(-1).split(_PIECE), strict=True):
        kept = mine.clone()
        mine.copy_(its)
        its.copy_(kept)
    return other


def _restored(bank: Bank, small: Compact) -> Tensor:
    try:
        return small.corrections.applied(_predicted(bank, small.tensor, small.paths, small.names, small.fixed))
    except ArithmeticError as error:
        raise AdapterError(
            f"{small.paths[0]}: its weight cannot be restored, since it or a merged adapter has been changed since; "
            "load the model again"
        ) from error


def _predicted(
    bank: Bank,
    merged: Tensor,
    paths: Sequence[str],
    names: Sequence[str],
    fixed: Mapping[tuple[str, str], Tensors],
) -> Tensor:
    """The original of a merged tensor, up to rounding: always the same one for the same arguments."""
    target = merged.detach().double()
    original = target
    layers = {path: _merged_layers(bank, path, names) for path in paths}
    is_sum = all(layer.is_additive for found in layers.values() for layer in found.values())
    for _ in range(1 if is_sum else _STEPS):
        total = original
        for path, found in layers.items():
            spec = next(iter(found.values())).spec
            base = spec.to_stored(total)
            ready = [compose.wide(layer, base) for layer in found.values()]
            ready = [
                r._replace(tensors={**r.tensors, **fixed.get((path, name), {})})
                for r, name in zip(ready, found, strict=True)
            ]
            total = spec.to_stored(compose.weight(ready, base))
        original = original - (total - target)
    return original.to(merged.dtype)


def _merged_layers(bank: Bank, path: str, names: Collection[str]) -> dict[str, AdapterLayer]:
    """In the order of attachment, so that every way to the same set of merged adapters gives the same bits."""
    return {name: a.layers[path] for name, a in bank.adapters.items() if name in names and path in a.layers}


def _writable(host: nn.Module, where: str, name: str) -> Tensor:
    """The tensor that keeps a parameter, if it can be written."""
    tensor = resting_tensor(host, name)
    if tensor is None:
        raise AdapterError(f"{where}: the adapter changes the {name}, and the layer has none; keep it unmerged")
    if not tensor.is_floating_point() or type(tensor) not in (Tensor, nn.Parameter):
        raise AdapterError(
            f"{where}: its {name} is quantised ({type(tensor).__name__}, {tensor.dtype}); keep it unmerged"
        )
    if tensor.device.type == "meta":
        raise AdapterError(f"{where}: its {name} is on the meta device; load the weights before merging")
    return tensor


def _wide(tensor: Tensor, originals: Mapping[int, Tensor]) -> Tensor:
    """The original content, in a dtype to add in; possibly the original itself, so it must not be written."""
    original = originals.get(id(tensor), tensor).detach()
    return original.to(device=tensor.device, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def _rounded(where: str, tensor: Tensor, total: Tensor) -> Tensor:
    rounded = total.to(tensor.dtype)
    # Both are NaN if there is one. float8 has no order of its own; widening keeps its NaNs.
    extremes = torch.aminmax(rounded.float() if rounded.dtype in FLOAT8 else rounded)
    if not all(torch.isfinite(extreme) for extreme in extremes):
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
    return rounded
