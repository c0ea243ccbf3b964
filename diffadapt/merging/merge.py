"""Merge adapters into the weights of a model, and put every bit back.

The merged weight is that of `compose.weight`, computed in float32 (float64 for float64 weights) from the original one
and rounded once, however many adapters are merged. Weights are written in place: parameters stay the same objects,
compiled graphs stay valid.

Undoing is no subtraction, which rounding would make inexact. Either the originals are kept, or, in a few percent of
their memory, what a prediction from the merged weight (`folding`) gets wrong (`corrections`), or nothing, if the files
are at hand that the model was read from (`base_files`).

One base tensor is done after the other, so that no more than one is there twice. There is a way back from each before
it is written: if anything fails, those that were written already become what they were.
"""

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.moves import ByName, Moves
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.weight_update import wide_dtype
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import refresh_
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.base_weights import resting_tensor, weight_of
from diffadapt.runtime.undo import UndoByCopy
from diffadapt.types.layer_spec import LayerSpec


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str], keeping: Keeping | None = None) -> None:
    """Merge adapters `names`, at their present strengths, into every model that has them.

    Raises:
        AdapterError: a weight is quantised or out of reach, a bias is missing, a result is not finite, or an adapter
            that is not merged would act on the weights of one that is. Nothing has changed then.
    """
    names = tuple(names)
    wanted: dict[str, dict[str, Adapter]] = {}
    for component, model in models.items():
        bank = bank_of(model)
        if bank is not None:
            merged = (*bank.merged, *names)
            refuse_mixture(component, bank.adapters, merged)
            wanted[component] = {name: adapter for name, adapter in bank.adapters.items() if name in merged}
    with remerged(models, wanted, keeping or Keeping()):
        pass


@contextmanager
def remerged(
    models: Mapping[str, nn.Module],
    wanted: Mapping[str, ByName],
    keeping: Keeping,
    *,
    hosts: Mapping[str, Mapping[str, nn.Module]] | None = None,
) -> Generator[None, None, None]:
    """Put `wanted` adapters, by component, into the weights in the place of those that are merged now.

    Inside they are there; the body attaches what is new and detaches what is old. If it raises, or merging does, the
    weights are bit for bit what they were.

    Args:
        hosts: component -> module path -> layer, for adapters that are not attached yet.
    """
    moves = [
        Moves(models[component], component, adapters, (hosts or {}).get(component, {}), keeping)
        for component, adapters in wanted.items()
    ]
    try:
        with torch.no_grad():
            for model in moves:
                model.carry_out()
        yield
    except BaseException:
        with torch.no_grad():
            for model in moves:
                model.take_back()
        raise
    finally:
        for model in moves:
            model.keep()
    for component, adapters in wanted.items():
        bank = bank_of(models[component])
        if bank is not None:
            bank.merged = (*(n for n in bank.merged if n in adapters), *(n for n in adapters if n not in bank.merged))
            refresh_(models[component])


@torch.no_grad()
def unmerge_(model: nn.Module) -> None:
    """Put back every weight that `merge_` changed, bit for bit; the adapters run beside the weights again."""
    bank = bank_of(model)
    if bank is None or not bank.merged:
        return
    while bank.undo:
        bank.undo[-1].tensor.copy_(bank.undo[-1].restored())
        bank.undo.pop()
    bank.merged = ()
    refresh_(model)


@torch.no_grad()
def expand_(bank: Bank) -> None:
    """Copies in the place of what is kept compactly, for what needs the originals themselves."""
    for number, way in enumerate(bank.undo):
        if isinstance(way, UndoByCorrection):
            bank.undo[number] = UndoByCopy(way.tensor, way.restored())


def original_weight(bank: Bank, path: str, spec: LayerSpec) -> Tensor:
    """A layer's own weight, canonical and decoded, as it was before anything was merged into it."""
    host = bank.hosts[path]
    tensor = resting_tensor(host, "weight") if bank.merged else None
    kept = next((way.restored() for way in bank.undo if way.tensor is tensor), None)
    if kept is None:
        return weight_of(host, spec)
    return spec.to_stored(kept.detach().to(wide_dtype(kept)))


def refuse_mixture(component: str, adapters: Mapping[str, Adapter], merged: Collection[str]) -> None:
    """Raise `AdapterError` if an active adapter that multiplies weights would find them changed by a merged one.

    A sum of changes does not care which of them are in the weight already; a rotation or a scale does.
    """
    below = {path: name for name in merged if name in adapters for path in adapters[name].layers}
    for name, adapter in adapters.items() if below else ():
        for path, layer in adapter.layers.items() if adapter.active and name not in merged else ():
            if path in below and not layer.is_additive:
                raise AdapterError(
                    f"{component}.{path}: adapter {name!r} ({layer.adapter_type.name}) multiplies the weight, which a "
                    f"merged {below[path]!r} changes; merge both in one call, or deactivate {name!r}"
                )
