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

import math
from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import Adapter, weight_of
from diffadapt.attach import Bank, bank_of, refresh_
from diffadapt.base_files import Stored
from diffadapt.compact import Compact
from diffadapt.corrections import Corrections
from diffadapt.errors import AdapterError
from diffadapt.folding import Folding, General, Layers, LowRank, folding, wide_dtype
from diffadapt.hooks import FLOAT8, resting_tensor
from diffadapt.io import OpenFile
from diffadapt.layer import LayerSpec
from diffadapt.memory import Arena, Scratch
from diffadapt.undo import Copy, Undo

ByName = Mapping[str, Adapter]
"""The adapters that are merged into a model. In the order of attachment, whatever way led to them: it decides bits."""


@dataclass(frozen=True)
class Keeping:
    """What to keep of the weights that merging overwrites.

    Attributes:
        compact: what rounding lost instead of copies, where that is less; `None` for where it also is faster: sums of
            low-rank changes on weights of half precision.
        files: component -> files that its weights were read from. Nothing is kept of what one of them has.
    """

    compact: bool | None = None
    files: Mapping[str, Sequence[OpenFile]] = field(default_factory=dict[str, Sequence[OpenFile]])

    @classmethod
    def of(cls, models: Mapping[str, nn.Module]) -> "Keeping":
        """As it is done for what is merged now."""
        ways = {component: bank.undo for component, model in models.items() if (bank := bank_of(model)) is not None}
        kinds = {type(way) for undo in ways.values() for way in undo}
        files = {
            component: tuple(dict.fromkeys(way.file for way in undo if isinstance(way, Stored)))
            for component, undo in ways.items()
        }
        return cls(True if Compact in kinds else False if Copy in kinds else None, files)


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str], keeping: Keeping = Keeping()) -> None:
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
    with remerged(models, wanted, keeping):
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
        _Moves(models[component], component, adapters, (hosts or {}).get(component, {}), keeping)
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
        if isinstance(way, Compact):
            bank.undo[number] = Copy(way.tensor, way.restored())


def original_weight(bank: Bank, path: str, layer: LayerSpec) -> Tensor:
    """A layer's own weight, canonical and decoded, as it was before anything was merged into it."""
    host = bank.hosts[path]
    tensor = resting_tensor(host, "weight") if bank.merged else None
    kept = next((way.restored() for way in bank.undo if way.tensor is tensor), None)
    if kept is None:
        return weight_of(host, layer)
    return layer.to_stored(kept.detach().to(wide_dtype(kept)))


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


@dataclass(frozen=True)
class _Place:
    """A base weight, and what is to be merged into it.

    Attributes:
        where: component and path, for messages.
        name: of the tensor in its model.
        bias: of the same layer, if that is changed too.
    """

    tensor: Tensor
    where: str
    name: str
    layers: Layers
    bias: Tensor | None


@dataclass(frozen=True)
class _Step:
    """Something written, and what it takes to undo that.

    Attributes:
        tensor: the weight.
        bias: of the same layer, if it was written.
        old: what was merged into them.
        kept: the ways back from that, by `id` of a tensor.
    """

    tensor: Tensor
    bias: Tensor | None
    old: _Place | None
    kept: Mapping[int, Undo]


class _Moves:
    """The way of one model's weights from what is merged to what is wanted, tensor by tensor."""

    def __init__(
        self, model: nn.Module, component: str, wanted: ByName, hosts: Mapping[str, nn.Module], keeping: Keeping
    ) -> None:
        """
        Args:
            hosts: of layers that have no adapters yet.

        Raises:
            AdapterError: a weight cannot be written.
        """
        bank = bank_of(model)
        present = {} if bank is None else {n: adapter for n, adapter in bank.adapters.items() if n in bank.merged}
        hosts = hosts if bank is None else {**hosts, **bank.hosts}
        self._model, self._compact = model, keeping.compact
        self._files = keeping.files.get(component, ())
        users = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
        self._before, self._after = (_places(component, adapters, hosts, users) for adapters in (present, wanted))
        self._undo: dict[int, Undo] = {} if bank is None else bank.ways
        self._done: list[_Step] = []
        self._arena, self._scratch = Arena(), Scratch()

    def carry_out(self) -> None:
        """Write, see `remerged`."""
        for key in (*self._before, *(key for key in self._after if key not in self._before)):
            old, new = self._before.get(key), self._after.get(key)
            if old is None or new is None or old.layers != new.layers:
                self._write_(old, new)

    def take_back(self) -> None:
        """Undo what `carry_out` has done so far."""
        while self._done:
            step = self._done.pop()
            way = self._undo.pop(id(step.tensor), None)
            original = step.tensor.detach() if way is None else way.restored()
            if step.bias is not None:
                self._write_bias_(step.bias, step.old, original)
                self._undo.pop(id(step.bias), None)
            if step.old is not None:
                _fold_(step.old, folding(step.old.layers, original), original)
            elif way is not None:
                step.tensor.copy_(original)
            self._undo.update(step.kept)

    def keep(self) -> None:
        """Leave with the model what undoes the changes."""
        bank = bank_of(self._model)
        if bank is not None:
            bank.undo[:] = self._undo.values()

    def _write_(self, old: _Place | None, new: _Place | None) -> None:
        place = new or old
        assert place is not None
        tensor, key = place.tensor, id(place.tensor)
        bias = next((each.bias for each in (old, new) if each is not None and each.bias is not None), None)
        kept = {id(own): self._undo[id(own)] for own in (tensor, bias) if id(own) in self._undo}
        way, fresh = self._undo.get(key), key not in self._undo
        if way is None:
            way = Stored.of(tensor, place.where, place.name, self._files)
        original = (tensor.detach() if way is None else way.restored()).contiguous()
        ways = None if new is None else folding(new.layers, original)
        compact = self._compact
        if isinstance(way, Stored) or ways is None:
            compact = False
        elif compact is None:
            compact = isinstance(ways[1], LowRank) and original.element_size() < 4
        if way is None:
            # A copy that is needed for a moment only goes where the last one was.
            original = self._scratch.like(original).copy_(original) if compact else self._copy(original)
        if way is None or isinstance(way, Compact):
            # What was lost by merging one adapter says nothing after another.
            way = Copy(tensor, original)
        self._undo[key] = way
        if bias is not None and id(bias) not in kept:
            self._undo[id(bias)] = Copy(bias, self._copy(bias.detach()))

        self._done.append(_Step(tensor, bias, old, kept))
        if bias is not None:
            self._write_bias_(bias, new, original)
        if new is None or ways is None:
            tensor.copy_(original)
            del self._undo[key]
            return
        small = _fold_(new, ways, original, fresh=fresh, scratch=self._scratch if compact else None)
        if small is not None:
            self._undo[key] = small
        elif compact and fresh:
            self._undo[key] = Copy(tensor, self._copy(original))

    def _write_bias_(self, bias: Tensor, place: _Place | None, weight: Tensor) -> None:
        """Write what belongs to a merged weight, or what was there before any merging.

        Args:
            weight: before any merging.
        """
        way = self._undo.get(id(bias))
        content = bias.detach() if way is None else way.restored()
        if place is not None and place.bias is not None:
            bias.copy_(_with_bias(place, weight, content))
        else:
            bias.copy_(content)
            self._undo.pop(id(bias), None)

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._arena.copy(tensor) if tensor.device.type == "cpu" else tensor.clone()


def _places(
    component: str, adapters: ByName, hosts: Mapping[str, nn.Module], users: Mapping[int, int]
) -> dict[int, _Place]:
    """`id` of a base weight -> what these adapters do to it.

    Args:
        users: `id` of a parameter -> how many modules have it.
    """
    found: dict[int, _Place] = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers):
        host, where = hosts[path], f"{component}.{path}"
        layers = tuple(adapter.layers[path] for adapter in adapters.values() if path in adapter.layers)
        weight, bias = _writable(host, where, "weight"), None
        if compose.changes_bias(((layer, layer.tensors) for layer in layers), getattr(host, "bias", None) is not None):
            bias = _writable(host, where, "bias")
        if any(users.get(id(tensor), 1) > 1 for tensor in (weight, bias) if tensor is not None):
            raise AdapterError(f"{where}: another layer has the same weight, and would change too; keep it unmerged")
        found[id(weight)] = _Place(weight, where, f"{path}.weight", layers, bias)
    return found


def _fold_(
    place: _Place,
    ways: tuple[Folding, Folding],
    original: Tensor,
    *,
    fresh: bool = False,
    scratch: Scratch | None = None,
) -> Compact | None:
    """Write the original with adapters in it.

    Args:
        ways: there and back.
        original: content of the tensor before any merging.
        fresh: the tensor still has that.
        scratch: to find out what restores it; its number 0 is not used.

    Returns:
        What restores it, if that was asked for and is less than a copy.

    Raises:
        AdapterError: the result is not finite, and written nevertheless.
    """
    weight, (forth, back) = place.tensor.detach(), ways
    direct = weight.is_contiguous() and weight.dtype == original.dtype
    target = weight if direct else torch.empty_like(original)
    source = weight if direct and fresh else original
    compact, corrections = scratch is not None, list[Corrections]()
    for rows in back.pieces():
        piece = target[rows]
        forth.merge(source[rows], rows, piece)
        compact = compact and back.settle(original[rows], piece)
        if compact and scratch is not None:
            corrections.append(Corrections.between(original[rows], back.bounds(piece, rows, scratch)))
    _refuse_non_finite(place.where, target)
    if not direct:
        weight.copy_(target)
    if not compact:
        return None
    fixed, steps = (back.fixed, back.steps) if isinstance(back, General) else ({}, 0)
    small = Compact(place.tensor, place.where, original.dtype, place.layers, fixed, steps, tuple(corrections))
    return small if small.nbytes < original.nbytes else None


def _with_bias(place: _Place, weight: Tensor, original: Tensor) -> Tensor:
    """A bias with what belongs to the changes of its weight."""
    base = place.layers[0].spec.to_stored(weight.to(wide_dtype(weight)))
    ready = [compose.wide(layer, base) for layer in place.layers]
    rounded = compose.bias(ready, original.to(wide_dtype(original))).to(original.dtype)
    _refuse_non_finite(place.where, rounded)
    return rounded


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


def _refuse_non_finite(where: str, rounded: Tensor) -> None:
    # float8 has no order of its own, and no sum; widening keeps its NaNs.
    wide = rounded.float() if rounded.dtype in FLOAT8 else rounded
    # A sum is quick, and finite only if all of its terms are; a large one need not be.
    if not math.isfinite(wide.sum()) and not all(map(math.isfinite, torch.aminmax(wide))):
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
