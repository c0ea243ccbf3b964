"""The writes that take one model's weights from the adapters merged now to those wanted, layer by layer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.merging.corrections import Corrections
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.memory import Arena, Scratch
from diffadapt.merging.merged_layers import ByName, MergedLayer, merged_layers
from diffadapt.merging.stored import Stored
from diffadapt.merging.undo_by_correction import UndoByCorrection
from diffadapt.merging.undo_by_parts import UndoByParts, restore_
from diffadapt.merging.undo_from_file import UndoFromFile
from diffadapt.merging.weight_update import AnyUpdate, LowRankUpdate, Updates, merge_dtype, weight_updates
from diffadapt.progress import with_progress
from diffadapt.runtime import compose
from diffadapt.runtime.adapter_layer import AdapterLayer, TermOf
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.ties import Owners
from diffadapt.runtime.undo import Undo, UndoByCopy
from diffadapt.types.tensor_ops import FLOAT8


@dataclass(frozen=True)
class _Task:
    """A base weight that is about to be rewritten.

    Attributes:
        old: what is merged into it now; `None` for nothing.
        new: what is to be merged into it; `None` for nothing.
        updates: the arithmetic of `new`; `None` if that is.
        original: the content of the weight before any merging.
        way: a way back to `original`, valid until the task is settled.
        is_fresh: whether the weight has its original content now.
        keeps_corrections: whether to keep corrections of `original`; a copy in `way` is temporary then.
    """

    weight: Stored
    old: MergedLayer | None
    new: MergedLayer | None
    updates: Updates | None
    original: Tensor
    way: Undo
    is_fresh: bool
    keeps_corrections: bool


@dataclass(frozen=True)
class _Step:
    """A layer that was rewritten, and what it takes to take that back.

    Attributes:
        weight: its weight if that was rewritten.
        bias: its bias if that was rewritten.
        old: what was merged into them before; `None` for nothing.
        ways: the ways back from `old`, by `id` of the tensor.
    """

    weight: Stored | None
    bias: Tensor | None
    old: MergedLayer | None
    ways: Mapping[int, Undo]


class Moves:
    """The writes that take one model's weights from the adapters merged now to those wanted."""

    def __init__(
        self,
        model: nn.Module,
        component: str,
        wanted: ByName,
        hosts: Mapping[str, nn.Module],
        keeping: Keeping,
        owners: Owners,
    ) -> None:
        """
        Args:
            component: name of the model, for messages.
            hosts: module path -> layer, for layers that carry no adapter yet.
            owners: the layers of all models by their parameters.

        Raises:
            AdapterError: a weight cannot be written.
        """
        bank = bank_of(model)
        merged = {} if bank is None else {n: adapter for n, adapter in bank.adapters.items() if n in bank.merged}
        hosts = hosts if bank is None else {**hosts, **bank.hosts}
        self._model, self._compact = model, keeping.compact
        self._files = keeping.files.get(component, ())
        self._old, self._new = (merged_layers(component, adapters, hosts, owners) for adapters in (merged, wanted))
        self._undo: dict[int, Undo] = {} if bank is None else bank.ways
        self._hosts = {
            layer: (hosts[path], f"{component}.{path}")
            for adapter in (*merged.values(), *wanted.values())
            for path, layer in adapter.layers.items()
        }
        self._done: list[_Step] = []
        self._arena, self._scratch = Arena(), Scratch()

    def carry_out(self) -> None:
        """Write all weights. If this raises, call `take_back`."""
        keys = (*self._old, *(key for key in self._new if key not in self._old))
        for key in with_progress(keys, "merging"):
            old, new = self._old.get(key), self._new.get(key)
            if old is None or new is None or old.layers != new.layers:
                self._rewrite_(old, new)

    def take_back(self) -> None:
        """Undo what `carry_out` has written so far."""
        while self._done:
            step, way, original = self._done.pop(), None, None
            if step.weight is not None:
                way = self._undo.pop(id(step.weight.tensor), None)
                original = step.weight.values() if way is None else way.restored()
            if step.bias is not None:
                self._write_bias_(step.bias, step.old, original)
                self._undo.pop(id(step.bias), None)
            if original is not None and step.old is not None and step.old.weight is not None:
                known = step.ways[id(step.old.weight.tensor)]
                _merge_(step.old, weight_updates(step.old.layers, original, self._term_of), original, known)
            elif way is not None:
                restore_(way)
            self._undo.update(step.ways)

    def keep(self) -> None:
        """Store the ways back in the model's bank."""
        bank = bank_of(self._model)
        if bank is not None:
            bank.undo[:] = self._undo.values()

    def _rewrite_(self, old: MergedLayer | None, new: MergedLayer | None) -> None:
        """Take one layer from `old` to `new`."""
        each = [layer for layer in (old, new) if layer is not None]
        weight = next((layer.weight for layer in each if layer.weight is not None), None)
        bias = next((layer.bias for layer in each if layer.bias is not None), None)
        task = None if weight is None else self._planned(weight, old, new)
        self._remember(old, weight, bias, None if task is None else task.way)
        if bias is not None:
            self._write_bias_(bias, new, None if task is None else task.original)
        if task is not None:
            self._settle(task, self._write_(task))

    def _planned(self, weight: Stored, old: MergedLayer | None, new: MergedLayer | None) -> _Task:
        """Read the original content of a weight, and decide how to keep it. Change nothing."""
        new = None if new is None or new.weight is None else new
        known = self._undo.get(id(weight.tensor))
        way = known or self._without_copy(weight, old or new)
        original = (weight.values() if known is None else known.restored()).contiguous()
        updates = None if new is None else weight_updates(new.layers, original, self._term_of)
        compact = updates is not None and self._keeps_corrections(way, updates, original)
        if way is None:
            # A temporary copy goes to scratch memory, where it overwrites that of the previous weight.
            original = self._scratch.like(original).copy_(original) if compact else self._copy(original)
        if way is None or isinstance(way, UndoByCorrection):
            # What rounding lost when `old` was merged says nothing once another adapter is.
            way = UndoByCopy(weight.tensor, original)
        return _Task(weight, old, new, updates, original, way, known is None, compact)

    def _without_copy(self, weight: Stored, layer: MergedLayer | None) -> Undo | None:
        """Return a way back from an unmerged weight that needs no copy of its values, if there is one."""
        assert layer is not None
        if weight.codec is not None:
            return UndoByParts.of(weight.host, weight.name, weight.where)
        return UndoFromFile.of(weight.tensor, layer.where, layer.name, self._files)

    def _keeps_corrections(self, way: Undo | None, updates: Updates, original: Tensor) -> bool:
        """Return whether to keep corrections of `original` rather than a copy.

        Neither is kept of a weight that is quantised or can be read from a file. Otherwise the caller's choice counts;
        without one, corrections are kept where they are also faster: for sums of low-rank changes on half-precision
        weights.
        """
        if isinstance(way, (UndoFromFile, UndoByParts)):
            return False
        if self._compact is not None:
            return self._compact
        return isinstance(updates.back, LowRankUpdate) and original.element_size() < 4

    def _remember(self, old: MergedLayer | None, weight: Stored | None, bias: Tensor | None, way: Undo | None) -> None:
        """Register ways back from everything that is about to be written; `way` is that of the weight."""
        tensors = [bias] if weight is None else [weight.tensor, bias]
        ways = {id(own): self._undo[id(own)] for own in tensors if id(own) in self._undo}
        self._done.append(_Step(weight, bias, old, ways))
        if weight is not None and way is not None:
            self._undo[id(weight.tensor)] = way
        if bias is not None and id(bias) not in ways:
            self._undo[id(bias)] = UndoByCopy(bias, self._copy(bias.detach()))

    def _write_(self, task: _Task) -> UndoByCorrection | None:
        """Write the weight. Return corrections if they are to be kept and smaller than a copy."""
        if task.new is None or task.updates is None:
            if isinstance(task.way, UndoByParts):
                task.way.restore_()
            else:
                task.weight.tensor.copy_(task.original)
            return None
        scratch = self._scratch if task.keeps_corrections else None
        try:
            return _merge_(task.new, task.updates, task.original, task.way, is_fresh=task.is_fresh, scratch=scratch)
        except AdapterError as error:
            where = task.new.where
            raise error if where in str(error) else AdapterError(f"{where}: {error}") from error

    def _settle(self, task: _Task, correction: UndoByCorrection | None) -> None:
        """Replace the way back that was valid while writing with the one to keep."""
        key = id(task.weight.tensor)
        if task.new is None:
            del self._undo[key]
        elif correction is not None:
            self._undo[key] = correction
        elif task.keeps_corrections and task.is_fresh:
            # The corrections turned out too large, and the copy is still in scratch memory.
            self._undo[key] = UndoByCopy(task.weight.tensor, self._copy(task.original))

    def _write_bias_(self, bias: Tensor, target: MergedLayer | None, weight: Tensor | None) -> None:
        """Write the bias that belongs to `target`, or the original bias if `target` is `None` or does not change it.

        Args:
            weight: the layer's weight before any merging; `None` if nothing changes it.
        """
        way = self._undo.get(id(bias))
        original = bias.detach() if way is None else way.restored()
        if target is not None and target.bias is not None:
            bias.copy_(_merged_bias(target, weight, original, self._term_of))
        else:
            bias.copy_(original)
            self._undo.pop(id(bias), None)

    def _term_of(self, layer: AdapterLayer) -> Tensor:
        """Return the `joint_term` of a layer for the weight that its host has without any merging."""
        host, where = self._hosts[layer]
        weight = Stored.of(host, where, "weight")
        way = self._undo.get(id(weight.tensor))
        original = weight.values() if way is None else way.restored()
        return layer.joint_term(layer.spec.to_stored(original.to(merge_dtype(original))))

    def _copy(self, tensor: Tensor) -> Tensor:
        return self._arena.copy(tensor) if tensor.device.type == "cpu" else tensor.clone()


def _merge_(
    target: MergedLayer,
    updates: Updates,
    original: Tensor,
    way: Undo,
    *,
    is_fresh: bool = False,
    scratch: Scratch | None = None,
) -> UndoByCorrection | None:
    """Write a weight with adapters merged into it.

    Args:
        original: content of the weight before any merging.
        way: a way back to it, which learns what rounding to quantised storage lost.
        is_fresh: whether the weight still has that content.
        scratch: buffers for computing corrections (number 0 is not used); `None` if none are to be computed.

    Returns:
        Corrections that restore the weight, if there are any and they are smaller than a copy.

    Raises:
        AdapterError: the weight cannot hold the result; it may have been written all the same.
    """
    assert target.weight is not None
    if isinstance(way, UndoByParts):
        merged = torch.empty_like(original)
        for rows in updates.back.chunks():
            updates.forth.merge(original[rows], rows, merged[rows])
        refuse_non_finite(target.where, merged)
        way.rounding = target.weight.encode_(merged, original)
        return None
    weight, (forth, back) = target.weight.tensor.detach(), updates
    in_place = weight.is_contiguous() and weight.dtype == original.dtype
    out = weight if in_place else torch.empty_like(original)
    source = weight if in_place and is_fresh else original
    compact, corrections = scratch is not None, list[Corrections]()
    for rows in back.chunks():
        chunk = out[rows]
        if chunk.dtype in FLOAT8:
            exact = torch.empty_like(chunk, dtype=torch.float32)
            forth.merge(source[rows], rows, exact)
            chunk.copy_(within_range(target.where, exact, chunk.dtype))
        else:
            forth.merge(source[rows], rows, chunk)
        compact = compact and back.record(original[rows], chunk)
        if compact and scratch is not None:
            corrections.append(Corrections.between(original[rows], back.bounds(chunk, rows, scratch)))
    refuse_non_finite(target.where, out)
    if not in_place:
        weight.copy_(out)
    if not compact:
        return None
    recorded, iterations = (back.recorded, back.iterations) if isinstance(back, AnyUpdate) else ({}, 0)
    undo = UndoByCorrection(
        target.weight.tensor, target.where, original.dtype, target.layers, recorded, iterations, tuple(corrections)
    )
    return undo if undo.nbytes < original.nbytes else None


def _merged_bias(target: MergedLayer, weight: Tensor | None, original: Tensor, term_of: TermOf) -> Tensor:
    """Return the bias with the changes that belong to the merged weight.

    Args:
        weight: the layer's weight before any merging; `None` if nothing changes it.
        original: the bias before any merging.
        term_of: see `AdapterLayer.prepare`.
    """
    dtype = merge_dtype(original)
    base = torch.zeros((), dtype=dtype, device=original.device).expand(target.layers[0].spec.weight_shape)
    if weight is not None:
        base = target.layers[0].spec.to_stored(weight.to(merge_dtype(weight)))
    prepared = [compose.prepare_for_weight(layer, base, term_of) for layer in target.layers]
    exact = compose.bias(prepared, original.to(dtype))
    rounded = within_range(target.where, exact, original.dtype).to(original.dtype)
    refuse_non_finite(target.where, rounded)
    return rounded


def within_range(where: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values that are about to be rounded to `dtype`. Raise `AdapterError` if float8 cannot hold them.

    Rounding to other dtypes makes such values infinite, which is found later; rounding to float8 may clip them.
    """
    largest = torch.finfo(dtype).max
    if dtype in FLOAT8 and not bool((values.abs() <= largest).all()):
        raise AdapterError(
            f"{where}: merging gives values that {dtype} cannot hold (at most {largest:g}); nothing was written"
        )
    return values


def refuse_non_finite(where: str, rounded: Tensor) -> None:
    # float8 has no comparison and no sum; float32 keeps its NaNs.
    values = rounded.float() if rounded.dtype in FLOAT8 else rounded
    # A sum is fast, and is finite only if all of its terms are; a large sum may overflow although they are.
    if not math.isfinite(values.sum()) and not all(map(math.isfinite, torch.aminmax(values))):
        raise AdapterError(f"{where}: merging gives values that {rounded.dtype} cannot hold; nothing was written")
