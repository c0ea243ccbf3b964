"""Give the adapter layers and slots of a model the fields of its regions."""

import torch

from diffadapt.runtime.bank import Bank
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.regions.fields import Region

_REGION = "region"


def assign_regions_(bank: Bank) -> None:
    """Make every adapter layer and slot act where the masks of `bank.call.regions` let it; everywhere without any.

    Slots always get fields, since they may have several adapters, with and without masks.
    """
    regions, reservation = bank.call.regions, bank.reservation
    seats = () if reservation is None else tuple(reservation.seated.items())
    state = (regions, *bank.adapters.items(), *seats)
    if regions is None and bank._assigned is None:
        return
    if bank._assigned is not None and _same(state, bank._assigned):
        return
    with ordinary_tensors():
        for name, adapter in bank.adapters.items():
            number = 0 if regions is None else regions.number(name)
            index = torch.tensor([number], device=adapter.gates.device)
            for path, layer in adapter.layers.items():
                layer.__dict__.pop(_REGION, None)
                if regions is not None and number:
                    layer.__dict__[_REGION] = Region(regions, path, index)
        if reservation is not None:
            numbers = torch.zeros(reservation.gates.shape[-1], dtype=torch.long, device=reservation.gates.device)
            for name, seat in reservation.seated.items():
                numbers[seat.cells] = 0 if regions is None else regions.number(name)
            for path, slots in reservation.slots.items():
                for slot in slots:
                    slot.__dict__.pop(_REGION, None)
                    if regions is not None:
                        index = numbers[slot.cells.start : slot.cells.stop]
                        slot.__dict__[_REGION] = Region(regions, path, index)
    bank._assigned = None if regions is None else state


def _same(state: tuple[object, ...], other: tuple[object, ...]) -> bool:
    """Return whether two states name the same objects."""
    return len(state) == len(other) and all(
        one is two or (isinstance(one, tuple) and isinstance(two, tuple) and one[0] == two[0] and one[1] is two[1])
        for one, two in zip(state, other, strict=True)
    )
