"""Slots: tensors of fixed shapes beside a layer, into which adapters are written while a compiled model keeps running.

A compiled model is bound to the shapes and the number of tensors it was traced with, not to what is in them. So room is
reserved once, on every layer that will need it (`Reservation`), and from then on loading, swapping, removing and
rescaling adapters are writes into it.

Adapters of different types share room where an exact common form exists (`lower`):

| form | holds | one adapter takes |
|---|---|---|
| rows | low-rank changes, `down` (R, in / groups, *kernel) and `up` (R, out) | as many rows as the rank of its change |
| IA3 | a factor per output (the magnitudes of a DoRA, ...) | one slot |
| full, of a bias | a change of the bias | one slot |
| the type's own | prepared tensors, in their shapes | one slot |

The gates of all slots of a model are views of one flat tensor, and free room has the gate zero. Views and not buffers,
for the reason that `adapter.Adapter` has for its own.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from diffadapt.adapter import PATCH_DELTA, AdapterLayer, Dropout, LayerTree
from diffadapt.errors import AdapterError
from diffadapt.kind import AdapterType, Stage, Tensors
from diffadapt.layer import LayerSpec
from diffadapt.types.full import FULL
from diffadapt.types.ia3 import IA3
from diffadapt.types.lora import LORA

Rows: TypeAlias = tuple[range, ...]
"""Stretches of the rows of a slot, ascending and apart from one another."""

_ROWS = "rows"
_MOST_VIEWS = 8
_IA3, _IA3_LYCORIS = IA3


class Form(NamedTuple):
    """A part of an adapter layer as it runs.

    Attributes:
        key: what has the same key has room in the same slots.
        tensors: what the functions of `kind` take, prepared.
        rows: how much it takes of a slot: its rank in the form "rows", else 1.
    """

    key: Hashable
    kind: AdapterType
    stages: tuple[Stage, ...]
    tensors: Tensors
    rows: int = 1

    def __str__(self) -> str:
        if self.key == _ROWS:
            return f"rank {self.rows}"
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"{self.kind.name} ({shapes})"


def lower(layer: AdapterLayer, weight: Callable[[], Tensor], device: torch.device | None = None) -> list[Form]:
    """The forms an adapter layer consists of; together they compute what the layer does.

    Args:
        weight: gives the base weight, as in `kind.Surroundings`. Meta tensors give meta tensors.
        device: where to compute what has to be computed; default where the adapter layer is.
    """
    kind, spec = layer.kind, layer.spec
    if kind is LORA and spec.groups == 1 and len(layer._parameters) == 2:
        # The usual case, without the detours: two factors are what is wanted.
        factors: Any = layer._parameters
        return [_rows(factors["lora_down"], factors["lora_up"])]
    tensors = layer.prepared(weight, device=device)
    forms: list[Form] = []
    rest: list[Stage] = [stage for stage in layer.stages if stage not in ("patch", "gain")]
    if "patch" in layer.stages:
        forms.append(_whole(kind, ("patch",), {PATCH_DELTA: tensors[PATCH_DELTA]}))
    if "gain" in layer.stages:
        gain = kind.gain(tensors)
        gain = gain.to(torch.promote_types(gain.dtype, torch.float32)).unsqueeze(1)
        like, factors = (_IA3, {"ia3_l": gain + 1}) if kind.gains_bias else (_IA3_LYCORIS, {"ia3_w": gain})
        forms.append(_whole(like, ("gain",), factors))
    low_rank = kind.as_low_rank(tensors, spec) if "add" in rest and spec.groups == 1 else None
    if low_rank is not None:
        rest.remove("add")
        forms.append(_rows(*low_rank))
        bias = kind.delta_bias(tensors)
        if bias is not None:
            forms.append(_whole(FULL, ("add",), {"diff_b": bias}))
    if rest:
        forms.append(_whole(kind, tuple(rest), tensors))
    return forms


def _rows(down: Tensor, up: Tensor) -> Form:
    return Form(_ROWS, LORA, ("add",), {"lora_down": down, "lora_up": up}, down.shape[0])


def _whole(kind: AdapterType, stages: tuple[Stage, ...], tensors: Tensors) -> Form:
    shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in tensors.items()))
    return Form((kind.name, kind.gains_bias, stages, shapes), kind, stages, tensors)


Forms: TypeAlias = Mapping[str, Sequence[Form]]
"""Module path -> what `lower` made of the adapter layer there."""


class Slot(AdapterLayer):
    """Room for one form, or for many of the form "rows", on one layer. It runs like an adapter layer.

    Attributes:
        key: of the forms that have room here.
        cells: where its gates are in the flat tensor of the reservation.
        free: the rows that are nobody's.
    """

    key: Hashable
    cells: range
    free: Rows
    _dtype: torch.dtype
    _views: dict[Rows, tuple[tuple[int, int], list[Tensor]]]

    def __init__(self, form: Form, spec: LayerSpec, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """
        Args:
            form: the shapes and, but for what computes in `dtype`, the dtypes it is for.
            rows: how many rows there are, 1 unless the form is "rows".
        """
        nn.Module.__init__(self)
        self.__dict__.update(
            kind=form.kind,
            spec=spec,
            alpha=None,
            settings={},
            stages=form.stages,
            key=form.key,
            free=(range(rows),),
            cells=range(rows),
            gates_ranks=form.key == _ROWS,
            dropout=Dropout(),
            inputs=spec.in_features,
            widens=False,
            training=False,
            _dtype=dtype,
            _views={},
        )
        shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in form.tensors.items()}
        if form.key == _ROWS:
            down, up = (rows, *spec.weight_shape[1:]), (spec.out_features, rows)
            shapes = {"lora_down": (down, dtype), "lora_up": (up, dtype)}
        for name, (shape, own) in shapes.items():
            wide = own in (torch.float32, torch.float64)
            tensor = torch.zeros(shape, dtype=own if wide else dtype, device=device)
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)

    def train(self, mode: bool = True) -> "Slot":
        """Stays as it is: nothing in a slot is trained."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The one to compute in, which is not that of tensors that are kept in float32."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Slot":
        self.__dict__["_dtype"] = fn(torch.empty(0, dtype=self._dtype, device=next(self.parameters()).device)).dtype
        super()._apply(fn, recurse)
        return self

    def at(self, rows: Rows) -> list[Tensor]:
        """What these rows consist of, to be written: of the form "rows" stretches of both factors."""
        if self.key != _ROWS:
            return list(self.tensors.values())
        down: Any = self._parameters["lora_down"]
        up: Any = self._parameters["lora_up"]
        if len(rows) == 1 and len(rows[0]) == len(self.cells):
            return [down, up]
        # Making these views takes about as long as writing to them. Offloading gives parameters other memory.
        memory = down.data_ptr(), up.data_ptr()
        known, views = self._views.get(rows, (None, []))
        if known != memory:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            views = [part for r in rows for part in (down.data[r.start : r.stop], up.data[:, r.start : r.stop])]
            self._views[rows] = memory, views
        return views

    def content(self, form: Form, rows: Rows) -> list[Tensor]:
        """What a form writes to `at(rows)`."""
        if form.key != _ROWS:
            return [form.tensors[name] for name in self._parameters]
        down, up = form.tensors["lora_down"], form.tensors["lora_up"]
        if len(rows) == 1:
            return [down, up]
        counts = [len(r) for r in rows]
        return [part for pair in zip(down.split(counts), up.split(counts, 1), strict=True) for part in pair]

    def _prepared(self) -> Tensors:
        return self.tensors


@dataclass
class Needs:
    """What adapters need on one layer.

    Attributes:
        rows: the largest rank of a low-rank change.
        forms: one of each other form, by key.
    """

    spec: LayerSpec
    rows: int = 0
    forms: dict[Hashable, Form] = field(default_factory=dict[Hashable, Form])

    def include(self, other: "Needs") -> None:
        """Grow to what either needs."""
        self.rows = max(self.rows, other.rows)
        self.forms.update(other.forms)

    def cover(self, forms: Iterable[Form]) -> None:
        """Grow to what an adapter layer of these forms needs."""
        for form in forms:
            if form.key == _ROWS:
                self.rows = max(self.rows, form.rows)
            else:
                self.forms.setdefault(form.key, form)


@dataclass(frozen=True)
class Seat:
    """Where an adapter is in a reservation.

    Attributes:
        taken: `(slot, its rows)`.
        cells: of its gates in the flat tensor.
        layers: the number of the adapter layer that each of those gates belongs to.
    """

    taken: Sequence[tuple[Slot, Rows]]
    cells: Tensor
    layers: Tensor


class Reservation(LayerTree):
    """The slots of one model, who sits in them, and their gates.

    Attributes:
        slots: module path of the model -> the slots there, in the order in which they run.
        seated: adapter name -> its seat.
    """

    def __init__(
        self, needs: Mapping[str, Needs], count: int, dtype: torch.dtype, device: torch.device, samples: int = 0
    ) -> None:
        """
        Args:
            count: how many adapters of the largest size have room at once.
            samples: how many samples of a batch can have gates of their own; 0 for one gate for all.
        """
        super().__init__()
        self.seated: dict[str, Seat] = {}
        self.slots: dict[str, tuple[Slot, ...]] = {}
        cells = 0
        for path, need in sorted(_levelled(needs).items()):
            made: list[Slot] = []
            if need.rows:
                shape = (need.rows, *need.spec.weight_shape[1:])
                rows = _rows(torch.empty(shape, device="meta"), torch.empty(0, 0, device="meta"))
                made.append(Slot(rows, need.spec, count * need.rows, dtype, device))
            for form in need.forms.values():
                made += [Slot(form, need.spec, 1, dtype, device) for _ in range(count)]
            node = nn.Module()
            for i, slot in enumerate(made):
                slot.__dict__["cells"] = range(cells, cells + len(slot.cells))
                cells = slot.cells.stop
                node._modules[str(i)] = slot
            self._graft(path, node)
            self.slots[path] = tuple(made)
        self._deal(torch.zeros((samples, cells) if samples else (cells,), device=device))

    @property
    def device(self) -> torch.device:
        """Where the slots are."""
        return self._gates.device

    @property
    def bytes(self) -> int:
        """Size of all slots."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    def arrange(self, new: Mapping[str, Forms], leaving: Sequence[str], gone: Sequence[str] = ()) -> "Arrangement":
        """Seats for adapters, for which as few others as possible have to leave theirs. Changes nothing.

        Args:
            new: adapter name -> module path -> what `lower` made of the adapter layer there, in the order of
                `Adapter.layers`.
            leaving: who may have to leave, in this order.
            gone: who leaves in any case.

        Raises:
            AdapterError: there is no room; the message names a layer, what it needs and what there is.
        """
        if [*new] == [*gone] and len(new) == 1:
            (name, forms), *_ = new.items()
            if name in self.seated and self._suits(self.seated[name], forms):
                return Arrangement(self, new, {name: self.seated[name]}, ())
        problem: AdapterError | None = None
        for count in range(len(leaving) + 1):
            left = (*gone, *leaving[:count])
            free = self._free_without(left)
            try:
                seats = {name: self._find(forms, free) for name, forms in new.items()}
            except AdapterError as error:
                problem = error
            else:
                return Arrangement(self, new, seats, left)
        assert problem is not None
        raise problem

    @torch.no_grad()
    def write(self, forms: Forms, seat: Seat) -> None:
        """Write an adapter into its seat. Its gates become zero."""
        self._gates.index_fill_(-1, seat.cells, 0.0)
        into: list[Tensor] = []
        what: list[Tensor] = []
        parts = (form for layer in forms.values() for form in layer)
        for (slot, rows), form in zip(seat.taken, parts, strict=True):
            into += slot.at(rows)
            what += slot.content(form, rows)
        if into:
            torch._foreach_copy_(into, what, non_blocking=True)

    def take(self, name: str, seat: Seat) -> None:
        """Give an adapter that has none a seat that `arrange` found."""
        for slot, rows in seat.taken:
            slot.__dict__["free"] = _without(slot.free, rows)
        self.seated[name] = seat

    @torch.no_grad()
    def leave(self, name: str) -> Seat | None:
        """Free the seat of an adapter, and return it; see `wipe`."""
        seat = self.seated.pop(name, None)
        if seat is not None:
            self._gates.index_fill_(-1, seat.cells, 0.0)
            for slot, rows in seat.taken:
                slot.__dict__["free"] = _joined(slot.free, rows)
        return seat

    @torch.no_grad()
    def vacate(self, name: str) -> None:
        """Free the seat of an adapter, if it has one, and leave nothing there."""
        left = self.leave(name)
        if left is not None:
            _wipe(left.taken)

    @torch.no_grad()
    def wipe(self, seats: Iterable[Seat]) -> None:
        """Zeros into what is free of these seats."""
        taken = ((slot, rows) for seat in seats for slot, rows in seat.taken if slot.free)
        _wipe((slot, _without(rows, _without(rows, slot.free))) for slot, rows in taken)

    @torch.no_grad()
    def open(self, gates: Mapping[str, Tensor]) -> None:
        """Let exactly these adapters act: name -> one number per adapter layer, or for every sample one per layer."""
        flat = self._gates.zero_()
        for name, values in gates.items():
            seat = self.seated[name]
            values = values.to(flat).index_select(-1, seat.layers)
            flat.index_copy_(-1, seat.cells, values.expand(*flat.shape[:-1], -1))

    @property
    def samples(self) -> int:
        """How many samples of a batch can have gates of their own; 0 for none."""
        return len(self._gates) if self._gates.ndim > 1 else 0

    def _free_without(self, names: Iterable[str]) -> dict[Slot, Rows]:
        """Free rows of every slot when these adapters have left."""
        free: dict[Slot, Rows] = {}
        for name in names:
            for slot, rows in self.seated[name].taken if name in self.seated else ():
                free[slot] = _joined(free.get(slot, slot.free), rows)
        return free

    def _suits(self, seat: Seat, forms: Forms) -> bool:
        """Whether an adapter of these forms takes exactly what a seat has."""
        parts = [(path, form) for path, layer in forms.items() for form in layer]
        return len(parts) == len(seat.taken) and all(
            slot.key == form.key and sum(map(len, rows)) == form.rows and slot in self.slots.get(path, ())
            for (path, form), (slot, rows) in zip(parts, seat.taken, strict=True)
        )

    def _find(self, forms: Forms, free: dict[Slot, Rows]) -> Seat:
        """A seat, which is taken out of `free`: rows by slot, where they differ from the slot's own."""
        taken: list[tuple[Slot, Rows]] = []
        starts: list[int] = []
        counts: list[int] = []
        layers: list[int] = []
        for number, (path, parts) in enumerate(forms.items()):
            slots = self.slots.get(path, ())
            for form in parts:
                for slot in slots:
                    if slot.key == form.key:
                        rows = free.get(slot, slot.free)
                        mine = _first(rows, form.rows)
                        if mine is not None:
                            break
                else:
                    raise AdapterError(self._no_room(path, form, free))
                free[slot] = _without(rows, mine)
                taken.append((slot, mine))
                for part in mine:
                    starts.append(slot.cells.start + part.start)
                    counts.append(len(part))
                    layers.append(number)
        cells, count = (torch.tensor(numbers, dtype=torch.long) for numbers in (starts, counts))
        # Of every stretch its start, and then one more for every row.
        cells = (cells - count.cumsum(0) + count).repeat_interleave(count) + torch.arange(sum(counts))
        device = self._gates.device
        return Seat(taken, cells.to(device), torch.tensor(layers, dtype=torch.long).repeat_interleave(count).to(device))

    def _deal(self, gates: Tensor) -> None:
        self._gates = gates
        for slots in self.slots.values():
            for slot in slots:
                cells = gates[..., slot.cells.start : slot.cells.stop]
                slot.__dict__["gate"] = cells if slot.gates_ranks else cells[..., 0]

    def _no_room(self, path: str, form: Form, free: Mapping[Slot, Rows]) -> str:
        slots = [slot for slot in self.slots.get(path, ()) if slot.key == form.key]
        if not slots:
            return f"{path}: {form} expected, no slots are reserved there{' for it' if path in self.slots else ''}"
        size = len(slots[0].cells)
        if form.rows > size:
            return f"{path}: {form} expected, slots for rank {size} are reserved there"
        left = sum(len(part) for slot in slots for part in free.get(slot, slot.free))
        taken = {name for name, seat in self.seated.items() if any(slot in slots for slot, _ in seat.taken)}
        what = f"{left} of {size} rows are" if form.key == _ROWS else f"{left} of {len(slots)} slots are"
        return f"{path}: {form} expected, {what} free there; {', '.join(sorted(taken))} took the others"


@dataclass(frozen=True)
class Arrangement:
    """Who gets which seat, and who has to leave."""

    reservation: Reservation
    new: Mapping[str, Forms]
    seats: Mapping[str, Seat]
    leaving: Sequence[str]

    def carry_out(self) -> None:
        """Write the adapters into their seats; their gates become zero."""
        seated = self.reservation.seated
        moving = [name for name in self.new if self.seats[name] is not seated.get(name)]
        left = [self.reservation.leave(name) for name in (*self.leaving, *moving)]
        for name in moving:
            self.reservation.take(name, self.seats[name])
        for name, forms in self.new.items():
            self.reservation.write(forms, self.seats[name])
        self.reservation.wipe(seat for seat in left if seat is not None)


def _wipe(taken: Iterable[tuple[Slot, Rows]]) -> None:
    """Zeros into rows: with what was left there a product may not be finite, and that times the gate 0 is not 0."""
    left = [part for slot, rows in taken if rows for part in slot.at(rows)]
    if left:
        torch._foreach_zero_(left)


def _levelled(needs: Mapping[str, Needs]) -> dict[str, Needs]:
    """The same needs on the same layer of all repeated blocks, which then share one compiled graph."""
    groups = {path: (re.sub(r"\.\d+(?=\.|$)", ".*", path), need.spec) for path, need in needs.items()}
    together: dict[Hashable, Needs] = {}
    for path, need in needs.items():
        together.setdefault(groups[path], Needs(need.spec)).include(need)
    return {path: together[group] for path, group in groups.items()}


# Most layers are alike in what is taken of them, so that most answers are known.
@lru_cache(maxsize=4096)
def _first(free: Rows, count: int) -> Rows | None:
    """So many free rows, next to one another where there is such a stretch; `None` if there are fewer."""
    for part in free:
        if len(part) >= count:
            return (part[:count],)
    if sum(map(len, free)) < count:
        return None
    found: list[range] = []
    for part in free:
        found.append(part[:count])
        count -= len(found[-1])
    return tuple(part for part in found if part)


@lru_cache(maxsize=4096)
def _without(rows: Rows, gone: Rows) -> Rows:
    if rows == gone:
        return ()
    for hole in gone:
        pieces = ((range(r.start, min(r.stop, hole.start)), range(max(r.start, hole.stop), r.stop)) for r in rows)
        rows = tuple(piece for pair in pieces for piece in pair if piece)
    return rows


@lru_cache(maxsize=4096)
def _joined(rows: Rows, others: Rows) -> Rows:
    if not rows:
        return others
    found: list[range] = []
    for part in sorted((*rows, *others), key=lambda part: part.start):
        if found and found[-1].stop == part.start:
            found[-1] = range(found[-1].start, part.stop)
        else:
            found.append(part)
    return tuple(found)
