"""The writes that take one model's weights from the adapters merged now to those wanted, tensor by tensor."""

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
from diffadapt.merging.weight_update import AnyUpdate, Layers, LowRankUpdate, Updates, merge_dtype, weight_updates
from diffadapt.runtime import compose
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.undo import Undo, UndoByCopy
from diffadapt.types.tensor_ops import FLOAT8
from diffadapt.weights.resting import resting_tensor

ByName = Mapping[str, Adapter]
"""The adapters merged into one model, always in the order of attachment, because the order decides the last bits."""


@dataclass(frozen=True)
class _MergedWeight:
    """A base weight and the adapter layers to merge into it.

    Attributes:
        where: component and module path, for messages.
        name: name of the tensor in its model.
        bias: the bias of the same layer if the adapters change it, else `None`.
    """

    tensor: Tensor
    where: str
    name: str
    layers: Layers
    bias: Tensor | None


@dataclass(frozen=True)
class _Task:
    """A base weight that is about to be rewritten.

    Attributes:
        old: what is merged into it now; `None` for nothing.
        new: what is to be merged into it; `None` for nothing.
        bias: the bias of the same layer if `old` or `new` changes it.
        updates: the arithmetic of `new`; `None` if that is.
        original: the content of the weight before any merging.
        way: a way back to `original`, valid until the task is settled.
        is_fresh: whether the weight has its original content now.
        keeps_corrections: whether to keep corrections of `original`; a copy in `way` is temporary then.
    """

    tensor: Tensor
    old: _MergedWeight | None
    new: _MergedWeight | None
    bias: Tensor | None
    updates: Updates | None
    original: Tensor
    way: Undo
    is_fresh: bool
    keeps_corrections: bool


@dataclass(frozen=True)
class _Step:
    """A weight that was rewritten, and what it takes to take that back.

    Attributes:
        bias: the bias of the same layer if it was rewritten too.
        old: what was merged into them before; `None` for nothing.
        ways: the ways back from `old`, by `id` of the tensor.
    """

    tensor: Tensor
    bias: Tensor | None
    old: _MergedWeight | None
    ways: Mapping[int, Undo]


class Moves:
    """The writes that take one model's weights from the adapters merged now to those wanted."""

    def __init__(
        self, model: nn.Module, component: str, wanted: ByName, hosts: Mapping[str, nn.Module], keeping: Keeping
    ) -> None:
        """
        Args:
            component: name of the model, for messages.
            hosts: module path -> layer, for layers that carry no adapter yet.

        Raises:
            AdapterError: a weight cannot be written.
        """
        bank = bank_of(model)
        merged = {} if bank is None else {n: adapter for n, adapter in bank.adapters.items() if n in bank.merged}
        hosts = hosts if bank is None else {**hosts, **bank.hosts}
        self._model, self._compact = model, keeping.compact
        self._files = keeping.files.get(component, ())
        users = Counter(id(own) for module in model.modules() for own in module._parameters.values() if own is not None)
        self._old, self._new = (_merged_weights(component, adapters, hosts, users) for adapters in (merged, wanted))
        self._undo: dict[int, Undo] = {} if bank is None else bank.ways
        self._done: list[_Step] = []
        self._arena, self._scratch = Arena(), Scratch()

    def carry_out(self) -> None:
        """Write all weights. If this raises, call `take_back`."""
        for key in (*self._old, *(key for key in self._new if key not in self._old)):
            old, new = self._old.get(key), self._new.get(key)
            if old is None or new is None or old.layers != new.layers:
                self._rewrite_(old, new)

    def take_back(self) -> None:
        """Undo what `carry_out` has written so far."""
        while self._done:
            step = self._done.pop()
            way = self._undo.pop(id(step.tensor), None)
            original = step.tensor.detach() if way is None else way.restored()
            if step.bias is not None:
                self._write_bias_(step.bias, step.old, original)
                self._undo.pop(id(step.bias), None)
            if step.old is not None:
                _merge_(step.old, weight_updates(step.old.layers, original), original)
            elif way is not None:
                step.tensor.copy_(original)
            self._undo.update(step.ways)

    def keep(self) -> None:
        """Store the ways back in the model's bank."""
        bank = bank_of(self._model)
        if bank is not None:
            bank.undo[:] = self._undo.values()

    def _rewrite_(self, old: _MergedWeight | None, new: _MergedWeight | None) -> None:
        """Take one weight, and the bias of its layer, from `old` to `new`."""
        task = self._planned(old, new)
        self._remember(task)
        correction = self._write_(task)
        self._settle(task, correction)

    def _planned(self, old: _MergedWeight | None, new: _MergedWeight | None) -> _Task:
        """Read the original content of a weight, and decide how to keep it. Change nothing."""
        target = new or old
        assert target is not None
        tensor, known = target.tensor, self._undo.get(id(target.tensor))
        way = known or UndoFromFile.of(tensor, target.where, target.name, self._files)
        original = (tensor.detach() if way is None else way.restored()).contiguous()
        updates = None if new is None else weight_updates(new.layers, original)
        compact = updates is not None and self._keeps_corrections(way, updates, original)
        if way is None:
            # A temporary copy goes to scratch memory, where it overwrites that of the previous weight.
            original = self._scratch.like(original).copy_(original) if compact else self._copy(original)
        if way is None or isinstance(way, UndoByCorrection):
            # What rounding lost when `old` was merged says nothing once another adapter is.
            way = UndoByCopy(tensor, original)
        bias = next((each.bias for each in (old, new) if each is not None and each.bias is not None), None)
        return _Task(tensor, old, new, bias, updates, original, way, known is None, compact)

    def _keeps_corrections(self, way: Undo | None, updates: Updates, original: Tensor) -> bool:
        """Return whether to keep corrections of `original` rather than a copy.

        Neither is kept of a weight that can be read from a file. Otherwise the caller's choice counts; without one,
        corrections are kept where they are also faster: for sums of low-rank changes on half-precision weights.
        """
        if isinstance(way, UndoFromFile):
            return False
        if self._compact is not None:
            return self._compact
        return isinstance(updates.back, LowRankUpdate) and original.element_size() < 4

    def _remember(self, task: _Task) -> None:
        """Register ways back from everything that is about to be written."""
        tensor, bias = task.tensor, task.bias
        ways = {id(own): self._undo[id(own)] for own in (tensor, bias) if id(own) in self._undo}
        self._done.append(_Step(tensor, bias, task.old, ways))
        self._undo[id(tensor)] = task.way
        if bias is not None and id(bias) not in ways:
            self._undo[id(bias)] = UndoByCopy(bias, self._copy(bias.detach()))

    def _write_(self, task: _Task) -> UndoByCorrection | None:
        """Write the weight and its bias. Return corrections if they are to be kept and smaller than a copy."""
        if task.bias is not None:
            self._write_bias_(task.bias, task.new, task.original)
        if task.new is None or task.updates is None:
            task.tensor.copy_(task.original)
            return None
        scratch = self._scratch if task.keeps_corrections else None
        return _merge_(task.new, task.updates, task.original, is_fresh=task.is_fresh, scratch=scratch)

    def _settle(self, task: _Task, correction: UndoByCorrection | None) -> None:
        """Replace the way back that was valid while writing with the one to keep."""
        key = id(task.tensor)
        if task.new is None:
            del self._undo[key]
        elif correction is not None:
            self._undo[key] = correction
        elif task.keeps_corrections and task.is_fresh:
            # The corrections turned out too large, and the copy is still in scratch memory.
            self._undo[key] = UndoByCopy(task.tensor, self._copy(task.original))

    def _write_bias_(self, bias: Tensor, target: _MergedWeight | None, weight: Tensor) -> None:
        """Write the bias that belongs to `target`, or the original bias if `target` is `None` or does not change it.

        Args:
            weight: the layer's weight before any merging.
        """
        way = self._undo.get(id(bias))
        original = bias.detach() if way is None else way.restored()
        if target is not None and target.bias is not None:
            bias.copy_(_merged_bias(target, weight, original))
        else:
            bias.copy_(original)
            self._undo.pop(id(bias), None)

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._arena.copy(tensor) if tensor.device.type == "cpu" else tensor.clone()


def _merged_weights(
    component: str, adapters: ByName, hosts: Mapping[str, nn.Module], users: Mapping[int, int]
) -> dict[int, _MergedWeight]:
    """Return what `adapters` merge into every base weight, by `id` of the weight.

    Args:
        users: `id` of a parameter -> number of modules that have it.

    Raises:
        AdapterError: a weight cannot be written, or several layers share it.
    """
    found: dict[int, _MergedWeight] = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.layers):
        host, where = hosts[path], f"{component}.{path}"
        layers = tuple(adapter.layers[path] for adapter in adapters.values() if path in adapter.layers)
        weight, bias = _writable(host, where, "weight"), None
        if compose.changes_bias(((layer, layer.tensors) for layer in layers), getattr(host, "bias", None) is not None):
            bias = _writable(host, where, "bias")
        if any(users.get(id(tensor), 1) > 1 for tensor in (weight, bias) if tensor is not None):
            raise AdapterError(f"{where}: another layer has the same weight and would change too; keep it unmerged")
        found[id(weight)] = _MergedWeight(weight, where, f"{path}.weight", layers, bias)
    return found


def _merge_(
    target: _MergedWeight, updates: Updates, original: Tensor, *, is_fresh: bool = False, scratch: Scratch | None = None
) -> UndoByCorrection | None:
    """Write a weight with adapters merged into it.

    Args:
        original: content of the weight before any merging.
        is_fresh: whether the weight still has that content.
        scratch: buffers for computing corrections (number 0 is not used); `None` if none are to be computed.

    Returns:
        Corrections that restore the weight, if there are any and they are smaller than a copy.

    Raises:
        AdapterError: the result is not finite; the weight may have been written all the same.
    """
    weight, (forth, back) = target.tensor.detach(), updates
    in_place = weight.is_contiguous() and weight.dtype == original.dtype
    out = weight if in_place else torch.empty_like(original)
    source = weight if in_place and is_fresh else original
    compact, corrections = scratch is not None, list[Corrections]()
    for rows in back.chunks():
        chunk = out[rows]
        forth.merge(source[rows], rows, chunk)
        compact = compact and back.record(original[rows], chunk)
        if compact and scratch is not None:
            corrections.append(Corrections.between(original[rows], back.bounds(chunk, rows, scratch)))
    _refuse_non_finite(target.where, out)
    if not in_place:
        weight.copy_(out)
    if not compact:
        return None
    recorded, iterations = (back.recorded, back.iterations) if isinstance(back, AnyUpdate) else ({}, 0)
    undo = UndoByCorrection(
        target.tensor, target.where, original.dtype, target.layers, recorded, iterations, tuple(corrections)
    )
    return undo if undo.nbytes < original.nbytes else None


def _merged_bias(target: _MergedWeight, weight: Tensor, original: Tensor) -> Tensor:
    """Return the bias with the changes that belong to the merged weight.

    Args:
        weight: the layer's weight before any merging.
        original: the bias before any merging.
    """
    base = target.layers[0].spec.to_stored(weight.to(merge_dtype(weight)))
    prepared = [compose.prepare_for_weight(layer, base) for layer in target.layers]
    rounded = compose.bias(prepared, original.to(merge_dtype(original))).to(original.dtype)
    _refuse_non_finite(target.where, rounded)
    return rounded


def _writable(host: nn.Module, where: str, name: str) -> Tensor:
    """Return the tensor that stores the parameter `name` of `host`.

    Raises:
        AdapterError: the parameter does not exist, is quantised, or is on the meta device.
    """
    tensor = resting_tensor(host, name)
    if tensor is None:
        raise AdapterError(f"{where}: the adapter changes the {name}, but the layer has none; keep it unmerged")
    if not tensor.is_floating_point() or type(tensor) not in (Tensor, nn.Parameter):
        raise AdapterError(
            f"{where}: its {name} is quantised ({type(tensor).__name__}, {tensor.dtype}); keep it unmerged"
        )
    if tensor.device.type == "meta":
        raise AdapterError(f"{where}: its {name} is on the meta device; load the weights before merging")
    return tensor


def _refuse_non_finite(where: str, rounded: Tensor) -> None:
    # float8 has no comparison and no sum; float32 keeps its NaNs.
    values = rounded.float() if rounded.dtype in FLOAT8 else rounded
    # A sum is fast, and is finite only if all of its terms are; a large sum may overflow although they are.
    if not math.isfinite(values.sum()) and not all(map(math.isfinite, torch.aminmax(values))):
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
