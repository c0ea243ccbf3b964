"""Give adapters seats in reserved slots: in all components, or in none.

What is where within one model is up to `slots.Reservation`; here is who gets a seat and who may have to leave.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.merging.merge import original_weight
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.slots.forms import Form, Forms, lower
from diffadapt.runtime.slots.reservation import Arrangement, Reservation

ByComponent = Mapping[str, Mapping[str, AdapterLayer]]
"""Component -> module path -> adapter layer."""


def find_room(
    loaded: AdapterSnapshot, name: str, layers: ByComponent, activate: bool, allow_recompile: bool, *, replacing: bool
) -> tuple[dict[str, Arrangement], set[str]]:
    """Seats for a new adapter by component, and the components in which it has to run beside the slots.

    Args:
        activate: it will act at once.
        allow_recompile: where there is no room, it may run beside the slots.
        replacing: whoever has that name will be gone.

    Raises:
        AdapterError: there is no room.
    """
    found: dict[str, Arrangement] = {}
    beside: set[str] = set()
    if not _is_prepared(loaded):
        return found, beside
    staying = set(loaded.active if activate else loaded.adapters) - {name}
    for component, part in layers.items():
        wanted = {name: {component: part}}
        here = {component: loaded.models[component]}
        try:
            found |= arrange(here, wanted, staying, [name] if replacing else [])
        except AdapterError as error:
            if not activate:
                with suppress(AdapterError):
                    # There is room for it once others are gone: it gets a seat when it is activated.
                    arrange(here, wanted, ())
                    continue
            if not allow_recompile:
                raise AdapterError(
                    f"{error}. Nothing was changed. Deactivate or remove adapters, include this one in "
                    "prepare_hotswap() before compiling, or pass allow_recompile=True"
                ) from error
            beside.add(component)
    return found, beside


def seat_(loaded: AdapterSnapshot, names: Iterable[str], staying: Collection[str] = ()) -> None:
    """Give these adapters seats where there are slots, before all others that are not in `staying`.

    Raises:
        AdapterError: there is no room. Nothing has changed then.
    """
    if not _is_prepared(loaded):
        return
    names = list(names)
    new: dict[str, dict[str, Mapping[str, AdapterLayer]]] = {}
    for name in names:
        for component, adapter in loaded[name].components.items():
            reservation = loaded.banks[component].reservation
            is_seated = reservation is not None and name in reservation.seated
            if adapter.layers and not adapter.outside_slots and not is_seated:
                new.setdefault(name, {})[component] = adapter.layers
    for arrangement in arrange(loaded.models, new, {*names, *staying}).values():
        arrangement.carry_out()


def arrange(
    models: Mapping[str, nn.Module],
    new: Mapping[str, ByComponent],
    staying: Collection[str],
    gone: Collection[str] = (),
) -> dict[str, Arrangement]:
    """Seats for adapters in the slots of every component. Changes nothing.

    Args:
        new: adapter name -> component -> its layers.
        staying: seated adapters that keep their seats; all others may lose theirs, those seated longest first.
        gone: who loses theirs in any case.

    Raises:
        AdapterError: there is no room.
    """
    arrangements: dict[str, Arrangement] = {}
    for component, model in models.items():
        mine = {name: layers[component] for name, layers in new.items() if component in layers}
        if mine:
            bank = bank_of(model)
            reservation = None if bank is None else bank.reservation
            if bank is None or reservation is None:
                raise AdapterError(f"{component}: no slots are reserved there")
            others = [name for name in reservation.seated if name not in staying]
            leaving = [name for name in others if name not in gone]
            try:
                forms = {name: _lowered(layers, bank, reservation) for name, layers in mine.items()}
                arrangements[component] = reservation.arrange(forms, leaving, [name for name in others if name in gone])
            except AdapterError as error:
                raise AdapterError(f"{component}.{error}") from error
    return arrangements


def _lowered(layers: Mapping[str, AdapterLayer], bank: Bank, room: Reservation) -> Forms:
    forms: dict[str, list[Form]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for path, layer in layers.items():
            if path not in room.slots:
                raise AdapterError(f"{path}: no slots are reserved there")
            here = room.slots[path][0].spec.in_features
            if layer.spec.in_features != here:
                raise AdapterError(
                    f"{path}: {layer.spec.in_features} inputs expected, slots for {here} are reserved there"
                )
            # Not the weight that others are merged into now: it may be another one when this adapter runs.
            forms[path] = lower(layer, partial(original_weight, bank, path, layer.spec), room.device)
    return forms


def _is_prepared(loaded: AdapterSnapshot) -> bool:
    """Whether any of the models has slots."""
    return any(bank.reservation is not None for bank in loaded.banks.values())
