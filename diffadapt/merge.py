"""Merge adapters into the weights of a model, and put every bit back.

The merged weight is that of `compose.weight`, computed in float32 (float64 for float64 weights) from the original one
and rounded once, however many adapters are merged. The originals are kept: undoing is a copy and not a subtraction.
Weights are written in place: parameters stay the same objects, compiled graphs stay valid.
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import Adapter
from diffadapt.attach import Bank, bank_of, refresh_
from diffadapt.errors import AdapterError
from diffadapt.hooks import resting_tensor


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Merge adapters `names`, at their present strengths, into every model that has them.

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
        changes[component] = _changes(component, bank, merged)
    for component, bank in banks.items():
        kept = {id(tensor) for tensor, _ in bank.originals}
        for tensor, rounded in changes[component]:
            if id(tensor) not in kept:
                bank.originals.append((tensor, tensor.detach().clone()))
            tensor.copy_(rounded)
        bank.merged = (*bank.merged, *(name for name in names if name in bank.adapters))
        refresh_(models[component])


@torch.no_grad()
def unmerge_(model: nn.Module) -> None:
    """Put back every weight that `merge_` changed, bit for bit; the adapters run beside the weights again."""
    bank = bank_of(model)
    if bank is None or not bank.merged:
        return
    for tensor, original in bank.originals:
        tensor.copy_(original)
    bank.originals.clear()
    bank.merged = ()
    refresh_(model)


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
    sharing: dict[int, list[str]] = {}
    for path in dict.fromkeys(path for name in names if name in bank.adapters for path in bank.adapters[name].layers):
        sharing.setdefault(id(_writable(bank.hosts[path], f"{component}.{path}", "weight")), []).append(path)
    changes: list[tuple[Tensor, Tensor]] = []
    for paths in sharing.values():
        total: Tensor | None = None
        for path in paths:
            host, where = bank.hosts[path], f"{component}.{path}"
            # In the order of attachment, so that every way to the same set of merged adapters gives the same bits.
            layers = [a.layers[path] for name, a in bank.adapters.items() if name in names and path in a.layers]
            if total is not None and not all(layer.is_additive for layer in layers):
                raise AdapterError(f"{where}: its weight is shared with another layer; keep it unmerged")
            tensor = _writable(host, where, "weight")
            base = layers[0].spec.to_stored(_wide(tensor, originals) if total is None else total)
            ready = [compose.wide(layer, base) for layer in layers]
            total = layers[0].spec.to_stored(compose.weight(ready, base))
            if compose.changes_bias(ready, getattr(host, "bias", None) is not None):
                bias = _writable(host, where, "bias")
                changes.append((bias, _rounded(where, bias, compose.bias(ready, _wide(bias, originals)))))
        tensor = _writable(bank.hosts[paths[0]], paths[0], "weight")
        assert total is not None
        changes.append((tensor, _rounded(f"{component}.{paths[0]}", tensor, total)))
    return changes


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
    # float8 has no isfinite of its own; widening keeps its NaNs.
    if not torch.isfinite(rounded.float()).all():
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
    return rounded
