"""Reservations: slots on the layers of a model, into which adapters are written while the compiled model keeps running.

A compiled model is bound to the number and the shapes of the tensors that it was traced with, not to their content. So
slots are reserved once, on every layer that will need them (`Reservation`). From then on, loading, swapping, removing
and rescaling adapters are writes into slots.

Adapters of different types share slots where an exact common form exists (`forms.lower`):

| form | content of a slot | an adapter takes |
|---|---|---|
| `ROWS` | low-rank changes, `down` (R, in / groups, *kernel) and `up` (out, R) | as many rows as its rank |
| IA3 | a factor per output (the magnitudes of a DoRA, ...) | one slot |
| full, bias only | a change of the bias | one slot |
| common | matrices as large as the weight, for types named in `common` (`common_forms`) | one slot each |
| the type's own | prepared tensors in their shapes | one slot |

The gates of all slots of a model are views of one flat tensor, as the gates of an adapter are (`LayerTree`). Free rows
have zeros in their tensors and their gates.
"""

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapter import LayerTree
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.slots.common_forms import bytes_in_common
from diffadapt.runtime.slots.forms import ROWS, Form, Forms, rows_form
from diffadapt.runtime.slots.row_ranges import Rows, first_rows, joined_rows, without_rows
from diffadapt.runtime.slots.slot import Needs, Seat, Slot
from diffadapt.types import TYPES


class Reservation(LayerTree):
    """The slots of one model, the seats of adapters in them, and their gates.

    Attributes:
        slots: module path of the model -> the slots there, in the order in which they run.
        seated: adapter name -> its seat; the adapter seated longest comes first.
        common: names of the adapter types that run in their common form.
    """

    def __init__(
        self,
        needs: Mapping[str, Needs],
        count: int,
        dtype: torch.dtype,
        device: torch.device,
        samples: int = 0,
        common: Collection[str] = (),
        adapters_per_sample: int = 0,
    ) -> None:
        """Make empty slots.

        Args:
            needs: module path -> the room that one adapter needs at most there.
            count: how many such adapters have room at once.
            dtype: the dtype to compute in.
            device: the device of the slots.
            samples: how many samples of a batch can have gates of their own; 0 for one gate for all samples.
            common: names of the adapter types that run in their common form.
            adapters_per_sample: with how many adapters in the mix of a sample its rows meet the ranks of these only,
                where that takes less than half of the arithmetic; 0 for all ranks in any case.
        """
        super().__init__()
        self.common = frozenset(common)
        self.seated: dict[str, Seat] = {}
        self.slots: dict[str, tuple[Slot, ...]] = {}
        self._picking: dict[tuple[int, int], list[Slot]] = {}
        cells = 0
        for path, need in sorted(_same_needs_in_all_blocks(needs).items()):
            made: list[Slot] = []
            if need.rows:
                shape = (need.rows, *need.spec.weight_shape[1:])
                example = rows_form(torch.empty(shape, device="meta"), torch.empty(0, 0, device="meta"))
                made.append(Slot(example, need.spec, count * need.rows, dtype, device))
                can_pick = need.spec.kind in ("linear", "conv") and need.spec.groups == 1
                if samples and can_pick and 0 < 2 * adapters_per_sample <= count:
                    sizes = count * need.rows, adapters_per_sample * need.rows
                    self._picking.setdefault(sizes, []).append(made[0])
            for form in need.forms.values():
                made += [Slot(form, need.spec, 1, dtype, device) for _ in range(count)]
            for i, slot in enumerate(made):
                slot.__dict__["cells"] = range(cells, cells + len(slot.cells))
                cells = slot.cells.stop
                self._insert(f"{path}.{i}", slot)
            self.slots[path] = tuple(made)
        self._assign_gates(torch.zeros((samples, cells) if samples else (cells,), dtype=torch.float32, device=device))

    @property
    def device(self) -> torch.device:
        """The device of the slots, or the first of several."""
        return self._gates.device

    @property
    def gates(self) -> Tensor:
        """The gates of all slots, (cells,) or (samples, cells)."""
        return self._gates

    @property
    def samples(self) -> int:
        """The number of samples of a batch that can have gates of their own; 0 if all samples share one gate."""
        return len(self._gates) if self._gates.ndim > 1 else 0

    def arrange(self, new: Mapping[str, Forms], may_leave: Sequence[str], leaving: Sequence[str] = ()) -> "Arrangement":
        """Find seats for adapters such that as few others as possible lose theirs. Nothing is changed.

        Args:
            new: adapter name -> module path -> the forms of the adapter layer there, in the order of `Adapter.layers`.
            may_leave: names of seated adapters that may lose their seats; those that come first lose theirs first.
            leaving: names of seated adapters that lose their seats in any case.

        Raises:
            AdapterError: there is no room. The message names a layer, what it needs and what is reserved there.
        """
        if [*new] == [*leaving] and len(new) == 1:
            (name, forms), *_ = new.items()
            if name in self.seated and self._fits(forms, self.seated[name]):
                return Arrangement(self, new, {name: self.seated[name]}, ())
        problem: AdapterError | None = None
        for count in range(len(may_leave) + 1):
            vacating = (*leaving, *may_leave[:count])
            free = self._free_without(vacating)
            try:
                seats = {name: self._find_seat(forms, free) for name, forms in new.items()}
            except AdapterError as error:
                problem = error
            else:
                return Arrangement(self, new, seats, vacating)
        assert problem is not None
        raise problem

    @torch.no_grad()
    def write(self, forms: Forms, seat: Seat) -> None:
        """Write an adapter into its seat. Its gates become zero."""
        self._clear_gates(seat)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        in_order = (form for layer_forms in forms.values() for form in layer_forms)
        for (slot, rows), form in zip(seat.taken, in_order, strict=True):
            targets += slot.views(rows)
            sources += slot.content(form, rows)
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)

    def take(self, name: str, seat: Seat) -> None:
        """Give an adapter without a seat the seat that `arrange` found for it."""
        for slot, rows in seat.taken:
            slot.__dict__["free"] = without_rows(slot.free, rows)
        self.seated[name] = seat

    @torch.no_grad()
    def leave(self, name: str) -> Seat | None:
        """Free the seat of an adapter and return it, or `None` if it has none. The content remains; see `wipe`."""
        seat = self.seated.pop(name, None)
        if seat is not None:
            self._clear_gates(seat)
            for slot, rows in seat.taken:
                slot.__dict__["free"] = joined_rows(slot.free, rows)
        return seat

    @torch.no_grad()
    def vacate(self, name: str) -> None:
        """Free the seat of an adapter, if it has one, and write zeros into it."""
        seat = self.leave(name)
        if seat is not None:
            _write_zeros(seat.taken)

    @torch.no_grad()
    def wipe(self, seats: Iterable[Seat]) -> None:
        """Write zeros into the rows of these seats that are free now."""
        taken = ((slot, rows) for seat in seats for slot, rows in seat.taken if slot.free)
        _write_zeros((slot, without_rows(rows, without_rows(rows, slot.free))) for slot, rows in taken)

    @torch.no_grad()
    def set_gates(self, gates: Mapping[str, Tensor]) -> None:
        """Make exactly these seated adapters act.

        Args:
            gates: adapter name -> its gates, of shape (layers,) or (samples, layers).
        """
        flat = self._gates.zero_()
        for name, values in gates.items():
            seat = self.seated[name]
            values = values.to(flat).index_select(-1, seat.layers)
            if values.ndim > 1:
                # There may be fewer samples than the slots have gates for.
                flat[: len(values)].index_copy_(-1, seat.cells, values)
            else:
                flat.index_copy_(-1, seat.cells, values.expand(*flat.shape[:-1], -1))
        self._update_copies()
        self._set_picks()

    def _set_picks(self) -> None:
        """Tell slots which ranks each sample has, or that it has more than they were reserved for."""
        for (size, most), slots in self._picking.items():
            starts = torch.tensor([slot.cells.start for slot in slots], device=self.device).unsqueeze(1)
            acting = self._gates[:, starts + torch.arange(size, device=self.device)] != 0
            fits = bool((acting.sum(-1) <= most).all())
            # (samples, slots, ranks), those that act first
            order = acting.to(torch.uint8).sort(stable=True, dim=-1, descending=True).indices[..., :most]
            for slot, picks in zip(slots, order.unbind(1), strict=True):
                if not fits:
                    slot.__dict__.pop("picks", None)
                elif slot.picks is None:
                    with ordinary_tensors():
                        slot.__dict__["picks"] = picks.to(self._gates_for(slot).device, copy=True)
                else:
                    slot.picks.copy_(picks)

    def leaves(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Yield every slot with the module path of its host."""
        return ((path, slot) for path, slots in self.slots.items() for slot in slots)

    def _clear_gates(self, seat: Seat) -> None:
        self._gates.index_fill_(-1, seat.cells, 0.0)
        self._update_copies()

    def _free_without(self, names: Iterable[str]) -> dict[Slot, Rows]:
        """Return the rows that are free once these adapters have left, by slot, where they differ from `Slot.free`."""
        free: dict[Slot, Rows] = {}
        for name in names:
            for slot, rows in self.seated[name].taken if name in self.seated else ():
                free[slot] = joined_rows(free.get(slot, slot.free), rows)
        return free

    def _fits(self, forms: Forms, seat: Seat) -> bool:
        """Return whether an adapter of these forms takes exactly the rows of `seat`."""
        in_order = [(path, form) for path, layer_forms in forms.items() for form in layer_forms]
        return len(in_order) == len(seat.taken) and all(
            slot.key == form.key and sum(map(len, rows)) == form.rows and slot in self.slots.get(path, ())
            for (path, form), (slot, rows) in zip(in_order, seat.taken, strict=True)
        )

    def _find_seat(self, forms: Forms, free: dict[Slot, Rows]) -> Seat:
        """Return a seat for an adapter of these forms, and remove its rows from `free` (see `_free_without`)."""
        taken: list[tuple[Slot, Rows]] = []
        starts: list[int] = []
        counts: list[int] = []
        layers: list[int] = []
        for number, (path, layer_forms) in enumerate(forms.items()):
            slots = self.slots.get(path, ())
            for form in layer_forms:
                for slot in slots:
                    if slot.key == form.key:
                        available = free.get(slot, slot.free)
                        rows = first_rows(available, form.rows)
                        if rows is not None:
                            break
                else:
                    raise AdapterError(self._no_room(path, form, free))
                free[slot] = without_rows(available, rows)
                taken.append((slot, rows))
                for part in rows:
                    starts.append(slot.cells.start + part.start)
                    counts.append(len(part))
                    layers.append(number)
        cells, count = (torch.tensor(numbers, dtype=torch.long) for numbers in (starts, counts))
        # Expand every range to its indices: its start once per row, plus 0, 1, 2, ... within the range.
        cells = (cells - count.cumsum(0) + count).repeat_interleave(count) + torch.arange(sum(counts))
        device = self._gates.device
        return Seat(taken, cells.to(device), torch.tensor(layers, dtype=torch.long).repeat_interleave(count).to(device))

    def _assign_gates(self, gates: Tensor) -> None:
        self._gates, self._copies = gates, {}
        for slots in self.slots.values():
            for slot in slots:
                cells = self._gates_for(slot)[..., slot.cells.start : slot.cells.stop]
                slot.__dict__["gate"] = cells if slot.gates_ranks else cells[..., 0]

    def _no_room(self, path: str, form: Form, free: Mapping[Slot, Rows]) -> str:
        slots = [slot for slot in self.slots.get(path, ()) if slot.key == form.key]
        if not slots:
            found = f"{path}: {form} expected, no slots are reserved there"
            return f"{found} for it{self._cost_of_common(path, form)}" if path in self.slots else found
        size = len(slots[0].cells)
        if form.rows > size:
            return f"{path}: {form} expected, slots for rank {size} are reserved there"
        left = sum(len(part) for slot in slots for part in free.get(slot, slot.free))
        takers = {name for name, seat in self.seated.items() if any(slot in slots for slot, _ in seat.taken)}
        what = f"{left} of {size} rows are" if form.key == ROWS else f"{left} of {len(slots)} slots are"
        return f"{path}: {form} expected, {what} free there; {', '.join(sorted(takers))} took the others"

    def _cost_of_common(self, path: str, form: Form) -> str:
        """Return how to reserve slots for any adapter of the type of `form`, and what one costs."""
        name = form.adapter_type.name
        if name in self.common or form.key == ROWS or form.adapter_type not in TYPES:
            return ""
        sizes = {p: bytes_in_common(form.adapter_type, s[0].spec, s[0].dtype) / 2**20 for p, s in self.slots.items()}
        return (
            f"; prepare_hotswap(..., types=[{name!r}]) reserves room for any {name}, which takes {sizes[path]:.2g} MiB "
            f"on this layer and {sum(sizes.values()):.2g} MiB on all of them for each slot"
        )


@dataclass(frozen=True)
class Arrangement:
    """Seats that were found for new adapters in a reservation, and the adapters that lose theirs.

    Attributes:
        reservation: the reservation.
        new: the new adapters, as in `Reservation.arrange`.
        seats: adapter name -> the seat found for it.
        leaving: names of the adapters that lose their seats.
    """

    reservation: Reservation
    new: Mapping[str, Forms]
    seats: Mapping[str, Seat]
    leaving: Sequence[str]

    def carry_out(self) -> None:
        """Write the new adapters into their seats. Their gates become zero."""
        seated = self.reservation.seated
        moving = [name for name in self.new if self.seats[name] is not seated.get(name)]
        left = [self.reservation.leave(name) for name in (*self.leaving, *moving)]
        for name in moving:
            self.reservation.take(name, self.seats[name])
        for name, forms in self.new.items():
            self.reservation.write(forms, self.seats[name])
        self.reservation.wipe(seat for seat in left if seat is not None)


def _write_zeros(taken: Iterable[tuple[Slot, Rows]]) -> None:
    """Write zeros into these rows: a product with old content may be infinite, and infinity times the gate 0 is NaN."""
    views = [view for slot, rows in taken if rows for view in slot.views(rows)]
    if views:
        torch._foreach_zero_(views)


def _same_needs_in_all_blocks(needs: Mapping[str, Needs]) -> dict[str, Needs]:
    """Return needs that are the same for a layer in all repeated blocks, so that the blocks share a compiled graph."""
    groups = {path: (re.sub(r"\.\d+(?=\.|$)", ".*", path), need.spec) for path, need in needs.items()}
    together: dict[Hashable, Needs] = {}
    for path, need in needs.items():
        together.setdefault(groups[path], Needs(need.spec)).include(need)
    return {path: together[group] for path, group in groups.items()}
