"""Merge adapters into the weights of a model, and put every bit back.

The merged weight is that of `compose.weight`, computed in float32 (float64 for float64 weights) from the original one
and rounded once, however many adapters are merged. Weights are written in place: parameters stay the same objects,
compiled graphs stay valid.

Undoing is no subtraction, which rounding would make inexact. Either the originals are kept, or, in a few percent of
their memory, what a prediction from the merged weight (`folding`) gets wrong (`corrections`).

One base tensor is done after the other, so that no more than one is there twice. What is kept of each leads back: if
anything fails, those that were written already become what they were.
"""

from collections import Counter
from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import Adapter, weight_of
from diffadapt.attach import Bank, bank_of, refresh_
from diffadapt.corrections import Corrections
from diffadapt.errors import AdapterError
from diffadapt.folding import Fixed, Folding, General, Layers, LowRank, folding, wide_dtype
from diffadapt.hooks import FLOAT8, resting_tensor
from diffadapt.layer import LayerSpec
from diffadapt.memory import Arena, Scratch

ByName = Mapping[str, Adapter]
"""The adapters that are merged into a model. In the order of attachment, whatever way led to them: it decides bits."""


@dataclass(frozen=True)
class Compact:
    """How to get a base tensor back that is not kept.

    Attributes:
        where: a path of the tensor, for messages.
        dtype: it had.
        layers: what is merged into it.
        fixed, steps: see `folding.General`.
        corrections: of its pieces.
    """

    tensor: Tensor
    where: str
    dtype: torch.dtype
    layers: Layers
    fixed: Fixed
    steps: int
    corrections: tuple[Corrections, ...]

    @property
    def nbytes(self) -> int:
        """Memory that is kept to undo the change."""
        fixed = sum(tensor.nbytes for tensors in self.fixed.values() for tensor in tensors.values())
        return fixed + sum(piece.nbytes for piece in self.corrections)

    def restored(self) -> Tensor:
        """The original, in new memory.

        Raises:
            AdapterError: it cannot be known any more.
        """
        # A model that was made wider since is wider without loss; narrower is told by the checksum.
        weight = self.tensor.detach().to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        way: Folding = LowRank.of(self.layers, weight, back=True) or General(self.layers, self.fixed, self.steps)
        try:
            for rows, piece in zip(way.pieces(), self.corrections, strict=True):
                way.predict_(weight[rows], rows)
                piece.apply_(weight[rows])
        except (ArithmeticError, ValueError) as error:
            raise AdapterError(
                f"{self.where}: its weight cannot be restored, since it or a merged adapter has been changed since; "
                "load the model again"
            ) from error
        return weight


@torch.no_grad()
def merge_(models: Mapping[str, nn.Module], names: Iterable[str], *, compact: bool | None = None) -> None:
    """Merge adapters `names`, at their present strengths, into every model that has them.

    Args:
        compact: keep what rounding lost instead of copies, where that is less; `None` for where it also is faster: sums
            of low-rank changes on weights of half precision.

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
    with remerged(models, wanted, compact=compact):
        pass


@contextmanager
def remerged(
    models: Mapping[str, nn.Module],
    wanted: Mapping[str, ByName],
    *,
    hosts: Mapping[str, Mapping[str, nn.Module]] | None = None,
    compact: bool | None = None,
) -> Generator[None, None, None]:
    """Put `wanted` adapters, by component, into the weights in the place of those that are merged now.

    Inside they are there; the body attaches what is new and detaches what is old. If it raises, or merging does, the
    weights are bit for bit what they were.

    Args:
        hosts: component -> module path -> layer, for adapters that are not attached yet.
        compact: see `merge_`.
    """
    moves = [
        _Moves(models[component], component, adapters, (hosts or {}).get(component, {}))
        for component, adapters in wanted.items()
    ]
    try:
        with torch.no_grad():
            for model in moves:
                model.carry_out(compact)
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
    while bank.compact:
        bank.compact[-1].tensor.copy_(bank.compact[-1].restored())
        bank.compact.pop()
    for tensor, original in bank.originals:
        tensor.copy_(original)
    bank.originals.clear()
    bank.merged = ()
    refresh_(model)


@torch.no_grad()
def expand_(bank: Bank) -> None:
    """Copies in the place of what is kept compactly, for what needs the originals themselves."""
    while bank.compact:
        bank.originals.append((bank.compact[-1].tensor, bank.compact[-1].restored()))
        bank.compact.pop()


def original_weight(bank: Bank, path: str, layer: LayerSpec) -> Tensor:
    """A layer's own weight, canonical and decoded, as it was before anything was merged into it."""
    host = bank.hosts[path]
    tensor = resting_tensor(host, "weight") if bank.merged else None
    kept = next((original for other, original in bank.originals if other is tensor), None)
    if kept is None:
        kept = next((small.restored() for small in bank.compact if small.tensor is tensor), None)
    if kept is None:
        return weight_of(host, layer)
    return layer.to_stored(kept.detach().to(wide_dtype(kept)))


def is_compact(models: Mapping[str, nn.Module]) -> bool:
    """Whether something is merged for which no copies are kept."""
    return any(bank.compact for model in models.values() if (bank := bank_of(model)) is not None)


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
        bias: of the same layer, if that is changed too.
    """

    tensor: Tensor
    where: str
    layers: Layers
    bias: Tensor | None


class _Moves:
    """The way of one model's weights from what is merged to what is wanted, tensor by tensor."""

    def __init__(self, model: nn.Module, component: str, wanted: ByName, hosts: Mapping[str, nn.Module]) -> None:
        """
        Args:
            hosts: of layers that have no adapters yet.

        Raises:
            AdapterError: a weight cannot be written.
        """
        bank = bank_of(model)
        present = {} if bank is None else {n: adapter for n, adapter in bank.adapters.items() if n in bank.merged}
        hosts = hosts if bank is None else {**hosts, **bank.hosts}
        self._model = model
        users = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
        self._before, self._after = (_places(component, adapters, hosts, users) for adapters in (present, wanted))
        self._copies = {} if bank is None else {id(tensor): (tensor, original) for tensor, original in bank.originals}
        self._compact: dict[int, Compact] = {} if bank is None else {id(small.tensor): small for small in bank.compact}
        self._done: list[int] = []
        self._arena, self._scratch = Arena(), Scratch()

    def carry_out(self, compact: bool | None) -> None:
        """Write, see `remerged`."""
        for key in (*self._before, *(key for key in self._after if key not in self._before)):
            old, new = self._before.get(key), self._after.get(key)
            if old is None or new is None or old.layers != new.layers:
                self._write_(key, old, new, compact)

    def take_back(self) -> None:
        """Undo what `carry_out` has done so far."""
        done, self._done = self._done, []
        for key in reversed(done):
            self._write_(key, self._after.get(key), self._before.get(key), key in self._compact)

    def keep(self) -> None:
        """Leave with the model what undoes the changes."""
        bank = bank_of(self._model)
        if bank is not None:
            bank.originals[:] = self._copies.values()
            bank.compact[:] = self._compact.values()

    def _write_(self, key: int, old: _Place | None, new: _Place | None, compact: bool | None) -> None:
        place = new or old
        assert place is not None
        tensor, original = place.tensor, self._original(place.tensor, keep=compact is False)
        bias = old.bias if old is not None and old.bias is not None else place.bias
        content = None if bias is None else self._original(bias, keep=True)
        changed = None
        if new is not None and new.bias is not None and content is not None:
            changed = _with_bias(new, original, content)
        fresh = key not in self._compact and key not in self._copies
        small = None if new is None else _merge_(new, original, fresh, compact, self._scratch)
        self._done.append(key)
        if new is None:
            tensor.copy_(original)
        self._compact.pop(key, None)
        copy = self._copies.pop(key, None)
        if small is not None:
            self._compact[key] = small
        elif new is not None:
            self._copies[key] = copy or (tensor, original if compact is False else self._copy(original))
        if bias is not None and content is not None:
            bias.copy_(content if changed is None else changed)
            self._copies.pop(id(bias), None)
            if changed is not None:
                self._copies[id(bias)] = bias, content

    def _original(self, tensor: Tensor, *, keep: bool) -> Tensor:
        """Content before any merging, not in the tensor itself.

        Args:
            keep: else it may be gone when this is called again.
        """
        if id(tensor) in self._compact:
            return self._compact[id(tensor)].restored()
        if id(tensor) in self._copies:
            return self._copies[id(tensor)][1]
        return self._copy(tensor.detach()) if keep else self._scratch.like(tensor).copy_(tensor)

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
        found[id(weight)] = _Place(weight, where, layers, bias)
    return found


def _merge_(place: _Place, original: Tensor, fresh: bool, compact: bool | None, scratch: Scratch) -> Compact | None:
    """Write the original with adapters in it, or nothing; what restores it, unless that is to be a copy.

    Args:
        original: content of the tensor before any merging, in other memory.
        fresh: the tensor still has that.
        scratch: its number 0 is not used.
    """
    weight, original = place.tensor.detach(), original.contiguous()
    way, back = folding(place.layers, original)
    if compact is None:
        compact = isinstance(back, LowRank) and original.element_size() < 4
    target = weight if fresh and weight.is_contiguous() else original.clone()
    corrections: list[Corrections] = []
    try:
        for rows in back.pieces():
            piece = target[rows]
            way.merge_(piece, rows)
            compact = compact and back.settle(original[rows], piece)
            if compact:
                corrections.append(Corrections.between(original[rows], back.bounds(piece, rows, scratch)))
        _refuse_non_finite(place.where, target)
    except BaseException:
        if target is weight:
            weight.copy_(original)
        raise
    if target is not weight:
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
    if not torch.isfinite(wide.sum()) and not all(torch.isfinite(extreme) for extreme in torch.aminmax(wide)):
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
