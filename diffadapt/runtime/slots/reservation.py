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
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import LayerTree
from diffadapt.runtime.slots.forms import ROWS, Form, Forms, rows_form
from diffadapt.runtime.slots.row_ranges import Rows, first_rows, joined_rows, without_rows
from diffadapt.runtime.slots.slot import Needs, Seat, Slot


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
                rows = rows_form(torch.empty(shape, device="meta"), torch.empty(0, 0, device="meta"))
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
            slot.__dict__["free"] = without_rows(slot.free, rows)
        self.seated[name] = seat

    @torch.no_grad()
    def leave(self, name: str) -> Seat | None:
        """Free the seat of an adapter, and return it; see `wipe`."""
        seat = self.seated.pop(name, None)
        if seat is not None:
            self._gates.index_fill_(-1, seat.cells, 0.0)
            for slot, rows in seat.taken:
                slot.__dict__["free"] = joined_rows(slot.free, rows)
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
        _wipe((slot, without_rows(rows, without_rows(rows, slot.free))) for slot, rows in taken)

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
                free[slot] = joined_rows(free.get(slot, slot.free), rows)
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
                        mine = first_rows(rows, form.rows)
                        if mine is not None:
                            break
                else:
                    raise AdapterError(self._no_room(path, form, free))
                free[slot] = without_rows(rows, mine)
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
        what = f"{left} of {size} rows are" if form.key == ROWS else f"{left} of {len(slots)} slots are"
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
