"""The way of one model's weights from one set of merged adapters to another, tensor by tensor."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.merging.corrections import Corrections
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.memory import Arena, Scratch
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.undo_from_file import UndoFromFile
from diffadapt.merging.weight_update import AnyUpdate, Layers, LowRankUpdate, WeightUpdate, weight_updates, wide_dtype
from diffadapt.runtime import compose
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.base_weights import resting_tensor
from diffadapt.runtime.undo import Undo, UndoByCopy
from diffadapt.types.tensor_ops import FLOAT8

ByName = Mapping[str, Adapter]
"""The adapters that are merged into a model. In the order of attachment, whatever way led to them: it decides bits."""


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


class Moves:
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
                _fold_(step.old, weight_updates(step.old.layers, original), original)
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
            way = UndoFromFile.of(tensor, place.where, place.name, self._files)
        original = (tensor.detach() if way is None else way.restored()).contiguous()
        ways = None if new is None else weight_updates(new.layers, original)
        compact = self._compact
        if isinstance(way, UndoFromFile) or ways is None:
            compact = False
        elif compact is None:
            compact = isinstance(ways[1], LowRankUpdate) and original.element_size() < 4
        if way is None:
            # A copy that is needed for a moment only goes where the last one was.
            original = self._scratch.like(original).copy_(original) if compact else self._copy(original)
        if way is None or isinstance(way, UndoByCorrection):
            # What was lost by merging one adapter says nothing after another.
            way = UndoByCopy(tensor, original)
        self._undo[key] = way
        if bias is not None and id(bias) not in kept:
            self._undo[id(bias)] = UndoByCopy(bias, self._copy(bias.detach()))

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
            self._undo[key] = UndoByCopy(tensor, self._copy(original))

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
    ways: tuple[WeightUpdate, WeightUpdate],
    original: Tensor,
    *,
    fresh: bool = False,
    scratch: Scratch | None = None,
) -> UndoByCorrection | None:
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
    for rows in back.chunks():
        chunk = target[rows]
        forth.merge(source[rows], rows, chunk)
        compact = compact and back.settle(original[rows], chunk)
        if compact and scratch is not None:
            corrections.append(Corrections.between(original[rows], back.bounds(chunk, rows, scratch)))
    _refuse_non_finite(place.where, target)
    if not direct:
        weight.copy_(target)
    if not compact:
        return None
    fixed, steps = (back.fixed, back.steps) if isinstance(back, AnyUpdate) else ({}, 0)
    small = UndoByCorrection(place.tensor, place.where, original.dtype, place.layers, fixed, steps, tuple(corrections))
    return small if small.nbytes < original.nbytes else None


def _with_bias(place: _Place, weight: Tensor, original: Tensor) -> Tensor:
    """A bias with what belongs to the changes of its weight."""
    base = place.layers[0].spec.to_stored(weight.to(wide_dtype(weight)))
    ready = [compose.with_weight(layer, base) for layer in place.layers]
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
