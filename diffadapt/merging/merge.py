"""Merge adapters into the weights of models, and restore every bit of the weights.

The merged weight is that of `compose.weight`, computed in float32 (float64 for float64 weights) from the original
weight and rounded once, however many adapters are merged. Weights are written in place: parameters stay the same
objects, and compiled graphs stay valid.

A quantised weight is decoded, merged in float32 and quantised again by its backend. Rounding to few bits may lose much
of a small change; how much is measured (`undo_by_parts`).

Unmerging does not subtract, because rounding would make that inexact. For each weight one of four things is kept: a
copy of the original; or, in a few percent of its memory, corrections of a prediction from the merged weight
(`undo_by_correction`); or nothing, if the files that the model was read from are at hand (`undo_from_file`); or, of a
quantised weight, copies of its packed parts (`undo_by_parts`).

Base tensors are written one after the other, so at most one of them exists twice. Each gets its way back before it is
written: if anything fails, the tensors written so far become what they were.
"""

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.merged_layers import ByName
from diffadapt.merging.moves import Moves
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.undo_by_parts import restore_, warn_of_losses
from diffadapt.merging.weight_update import merge_dtype
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.attach import refresh_
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.base_weight import weight_of
from diffadapt.runtime.ties import Owners
from diffadapt.runtime.undo import UndoByCopy
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.weights.resting import resting_tensor


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str], keeping: Keeping | None = None) -> None:
    """Merge the adapters `names`, at their current strengths, into every model that has them.

    Args:
        models: component -> model.
        keeping: what to keep of the weights; defaults to `Keeping()`.

    Raises:
        AdapterError: a weight cannot be written, or is on the meta device, a bias is missing, a weight cannot hold the
            result, or an active adapter that multiplies weights would find them changed. Nothing has changed then.
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
    """Merge the `wanted` adapters in place of those merged now, for the body and beyond.

    The body runs with the new weights; it attaches the new adapters and detaches the old ones. If it raises, or merging
    does, the weights are bit for bit what they were.

    Args:
        models: component -> model.
        wanted: component -> all adapters to be merged into its model.
        keeping: what to keep of the weights.
        hosts: component -> module path -> layer, for adapters that are not attached yet.

    Raises:
        AdapterError: a weight cannot be written, or is on the meta device, a bias is missing, or a weight cannot hold
            the result.
    """
    for component, adapters in wanted.items():
        bank = bank_of(models[component])
        if bank is not None:
            bank.refuse_lost_merges(models[component], (path for each in adapters.values() for path in each.layers))
            _refuse_later_writes(component, bank)
    owners = Owners(models)
    moves_by_model = [
        Moves(models[component], component, adapters, (hosts or {}).get(component, {}), keeping, owners)
        for component, adapters in wanted.items()
    ]
    try:
        with torch.no_grad():
            for moves in moves_by_model:
                moves.carry_out()
        yield
    except BaseException:
        # A model that cannot be taken back does not keep the others from it.
        with torch.no_grad(), ExitStack() as stack:
            for moves in reversed(moves_by_model):
                stack.callback(moves.take_back)
        raise
    finally:
        for moves in moves_by_model:
            moves.keep()
        for component in wanted:
            _note_versions(bank_of(models[component]))
    for component, adapters in wanted.items():
        bank = bank_of(models[component])
        if bank is not None:
            bank.merged = (*(n for n in bank.merged if n in adapters), *(n for n in adapters if n not in bank.merged))
            refresh_(models[component])
    warn_of_losses(models[component] for component in wanted)


@torch.no_grad()
def unmerge_(model: nn.Module) -> None:
    """Restore every weight that `merge_` changed, bit for bit. The adapters run next to the weights again.

    Raises:
        AdapterError: an original cannot be restored, because a weight, adapter or file was changed since.
    """
    bank = bank_of(model)
    if bank is None or not bank.merged:
        return
    bank.refuse_lost_merges(model)
    _refuse_later_writes(type(model).__name__, bank)
    try:
        while bank.undo:
            restore_(bank.undo[-1])
            bank.undo.pop()
    finally:
        _note_versions(bank)
    bank.merged = ()
    refresh_(model)


def _note_versions(bank: Bank | None) -> None:
    """Note the versions of the base tensors whose originals are kept as copies; other ways back check themselves."""
    if bank is not None:
        bank.versions = {
            id(way.tensor): way.tensor._version
            for way in bank.undo
            if isinstance(way, UndoByCopy) and type(way.tensor) is nn.Parameter and not way.tensor.is_inference()
        }


def _refuse_later_writes(where: str, bank: Bank) -> None:
    """Raise `AdapterError` if a base tensor was written after the merge: undoing the merge would undo that, too."""
    for way in bank.undo:
        noted = bank.versions.get(id(way.tensor))
        # Corrections compare checksums.
        if noted is None or isinstance(way, UndoByCorrection) or way.tensor._version == noted:
            continue
        owned = ((path, n) for path in bank.hosts for n in ("weight", "bias"))
        found = next((f".{path}.{n}" for path, n in owned if resting_tensor(bank.hosts[path], n) is way.tensor), "")
        raise AdapterError(
            f"{where}{found} was written after {', '.join(map(repr, bank.merged))} was merged into it, and undoing the "
            "merge would undo that, too; load the model again, and unmerge before weights are written"
        )


@torch.no_grad()
def expand_(bank: Bank) -> None:
    """Replace corrections with copies of the originals, for callers that read the originals while merged."""
    for number, way in enumerate(bank.undo):
        if isinstance(way, UndoByCorrection):
            bank.undo[number] = UndoByCopy(way.tensor, way.restored())


def original_weight(bank: Bank, path: str, spec: LayerSpec) -> Tensor:
    """Return the canonical, decoded weight of a layer as it was before any merging."""
    host = bank.hosts[path]
    tensor = resting_tensor(host, "weight") if bank.merged else None
    original = next((way.restored() for way in bank.undo if way.tensor is tensor), None)
    if original is None:
        return weight_of(host, spec)
    return spec.to_stored(original.detach().to(merge_dtype(original)))


def refuse_mixture(component: str, adapters: Mapping[str, Adapter], merged: Collection[str]) -> None:
    """Raise `AdapterError` if an active adapter that multiplies weights would find them changed by a merged one.

    An adapter whose change is that of no weight is refused, too. Otherwise, it does not matter to a sum of changes
    which of them the weight already contains; to a rotation or a scale it does.
    """
    for name in merged:
        for path, layer in adapters[name].layers.items() if name in adapters else ():
            reason = layer.adapter_type.weightless(layer.tensors)
            if reason is not None:
                raise AdapterError(
                    f"{component}.{path}: adapter {name!r} ({layer.adapter_type.name}) cannot be merged: {reason}"
                )
    merged_at = {path: name for name in merged if name in adapters for path in adapters[name].layers}
    for name, adapter in adapters.items() if merged_at else ():
        for path, layer in adapter.layers.items() if adapter.active and name not in merged else ():
            if path in merged_at and not layer.is_additive:
                raise AdapterError(
                    f"{component}.{path}: adapter {name!r} ({layer.adapter_type.name}) multiplies the weight, which a "
                    f"merged {merged_at[path]!r} changes; merge both in one call, or deactivate {name!r}"
                )
