"""Merge adapters into the weights of a model, and put every bit back.

`W' = W + sum of gate x delta`, added in float32 (float64 for float64 weights) from the original weights and rounded
once, however many adapters are merged. The originals are kept, so that undoing is a copy and not a subtraction.
Weights are written in place: parameters stay the same objects, compiled graphs stay valid.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.attach import Bank, bank_of, refresh_
from diffadapt.errors import AdapterError
from diffadapt.hooks import resting_tensor


@dataclass
class _Change:
    path: str
    tensor: Tensor
    original: Tensor
    total: Tensor


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Merge adapters `names`, at their present strengths, into every model that has them.

    Raises:
        AdapterError: a weight is quantised or out of reach, a bias is missing, or a result is not finite. Nothing
            has been written then.
    """
    names = tuple(names)
    banks = {component: bank for component, model in models.items() if (bank := bank_of(model)) is not None}
    changes = {component: _changes(bank, (*bank.merged, *names)) for component, bank in banks.items()}
    rounded: dict[str, list[Tensor]] = {}
    for component, planned in changes.items():
        rounded[component] = [_rounded(f"{component}.{change.path}", change) for change in planned]
    for component, bank in banks.items():
        kept = {id(tensor) for tensor, _ in bank.originals}
        for change, tensor in zip(changes[component], rounded[component], strict=True):
            if id(change.tensor) not in kept:
                bank.originals.append((change.tensor, change.tensor.detach().clone()))
            change.tensor.copy_(tensor)
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


def _changes(bank: Bank, names: tuple[str, ...]) -> list[_Change]:
    """What the weights become, unrounded, from the originals."""
    originals = {id(tensor): original for tensor, original in bank.originals}
    changes: dict[int, _Change] = {}
    for name, adapter in bank.adapters.items():
        if name not in names:
            continue
        for path, layer in adapter.layers.items():
            host = bank.hosts[path]
            gate = float(layer.gate)
            change = _change(changes, originals, host, path, "weight")
            tensors = {key: tensor.to(change.total) for key, tensor in layer.tensors.items()}
            delta = layer.spec.to_stored(layer.kind.delta_weight(tensors, layer.spec))
            change.total.add_(delta, alpha=gate)
            bias = layer.kind.delta_bias(tensors)
            if bias is not None:
                _change(changes, originals, host, path, "bias").total.add_(bias, alpha=gate)
    return list(changes.values())


def _change(
    changes: dict[int, _Change], originals: dict[int, Tensor], host: nn.Module, path: str, name: str
) -> _Change:
    tensor = resting_tensor(host, name)
    if tensor is None:
        raise AdapterError(f"{path}: the adapter changes the {name}, and the layer has none; keep it unmerged")
    if not tensor.is_floating_point() or type(tensor) not in (Tensor, nn.Parameter):
        raise AdapterError(
            f"{path}: its {name} is quantised ({type(tensor).__name__}, {tensor.dtype}); keep it unmerged"
        )
    if tensor.device.type == "meta":
        raise AdapterError(f"{path}: its {name} is on the meta device; load the weights before merging")
    if id(tensor) not in changes:
        original = originals.get(id(tensor), tensor)
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        total = original.detach().to(device=tensor.device, dtype=wide, copy=True)
        changes[id(tensor)] = _Change(path, tensor, original, total)
    return changes[id(tensor)]


def _rounded(path: str, change: _Change) -> Tensor:
    rounded = change.total.to(change.tensor.dtype)
    # float8 has no isfinite of its own; widening keeps its NaNs.
    if not torch.isfinite(rounded.float()).all():
        raise AdapterError(f"{path}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
    return rounded
