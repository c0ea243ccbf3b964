"""Give adapters seats in reserved slots: in all components, or in none.

This module decides which adapters get a seat and which may lose theirs. The seats within one model are found by its
`Reservation`.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cache, partial

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.merging.merge import original_weight
from diffadapt.runtime.adapter_layer import AdapterLayer
from diffadapt.runtime.bank import Bank, bank_of
from diffadapt.runtime.slots.common_forms import lower_in_common
from diffadapt.runtime.slots.forms import Form, Forms, lower
from diffadapt.runtime.slots.reservation import Arrangement, Reservation

ByComponent = Mapping[str, Mapping[str, AdapterLayer]]
"""Component -> module path -> adapter layer."""


def find_seats(
    snapshot: AdapterSnapshot, name: str, layers: ByComponent, activate: bool, allow_recompile: bool, *, replacing: bool
) -> tuple[dict[str, Arrangement], set[str]]:
    """Return seats for a new adapter by component, and the components in which it has to run outside the slots.

    A component is in neither if the adapter is inactive and gets its seat there when it is activated.

    Args:
        layers: adapter layers of the new adapter.
        activate: whether the adapter acts at once.
        allow_recompile: whether the adapter may run outside the slots where they have no room.
        replacing: whether it replaces the adapter that is loaded as `name`.

    Raises:
        AdapterError: the slots have no room. Nothing has changed then.
    """
    arrangements: dict[str, Arrangement] = {}
    outside: set[str] = set()
    if not _has_slots(snapshot):
        return arrangements, outside
    staying = set(snapshot.active if activate else snapshot.adapters) - {name}
    for component, own_layers in layers.items():
        new = {name: {component: own_layers}}
        model = {component: snapshot.models[component]}
        try:
            arrangements |= arrange(model, new, staying, [name] if replacing else [])
        except AdapterError as error:
            if not activate:
                with suppress(AdapterError):
                    # It fits once others have lost their seats, so it gets one when it is activated.
                    arrange(model, new, ())
                    continue
            if not allow_recompile:
                raise AdapterError(
                    f"{error}. Nothing was changed. Deactivate or remove adapters, include this one in "
                    "prepare_hotswap() before compiling, or pass allow_recompile=True"
                ) from error
            outside.add(component)
    return arrangements, outside


def seat_(snapshot: AdapterSnapshot, names: Iterable[str], staying: Collection[str] = ()) -> None:
    """Give adapters `names` seats in all components that have slots. Adapters not in `staying` may lose theirs.

    Raises:
        AdapterError: the slots have no room. Nothing has changed then.
    """
    if not _has_slots(snapshot):
        return
    names = list(names)
    new: dict[str, dict[str, Mapping[str, AdapterLayer]]] = {}
    for name in names:
        for component, adapter in snapshot[name].components.items():
            reservation = snapshot.banks[component].reservation
            is_seated = reservation is not None and name in reservation.seated
            if adapter.layers and not adapter.outside_slots and not is_seated:
                new.setdefault(name, {})[component] = adapter.layers
    for arrangement in arrange(snapshot.models, new, {*names, *staying}).values():
        arrangement.carry_out()


def arrange(
    models: Mapping[str, nn.Module],
    new: Mapping[str, ByComponent],
    staying: Collection[str],
    gone: Collection[str] = (),
) -> dict[str, Arrangement]:
    """Return seats for new adapters in the slots of every component. Change nothing.

    Args:
        new: adapter name -> component -> adapter layers.
        staying: seated adapters that keep their seats; all others may lose theirs, those seated longest first.
        gone: seated adapters that lose their seats in any case.

    Raises:
        AdapterError: the slots of a component have no room, or it has no slots.
    """
    arrangements: dict[str, Arrangement] = {}
    for component, model in models.items():
        here = {name: layers[component] for name, layers in new.items() if component in layers}
        if here:
            bank = bank_of(model)
            reservation = None if bank is None else bank.reservation
            if bank is None or reservation is None:
                raise AdapterError(f"{component}: no slots are reserved there")
            others = [name for name in reservation.seated if name not in staying]
            leaving = [name for name in others if name not in gone]
            try:
                forms = {name: _lowered(layers, bank, reservation) for name, layers in here.items()}
                arrangements[component] = reservation.arrange(forms, leaving, [name for name in others if name in gone])
            except AdapterError as error:
                raise AdapterError(f"{component}.{error}") from error
    return arrangements


def _lowered(layers: Mapping[str, AdapterLayer], bank: Bank, reservation: Reservation) -> Forms:
    """Return the forms of adapter layers by module path, on the device of the slots.

    Raises:
        AdapterError: a layer has no slots, or its slots are for another number of inputs.
    """
    forms: dict[str, list[Form]] = {}
    paths = {layer: path for path, layer in layers.items()}

    @cache
    def term_of(sibling: AdapterLayer) -> Tensor:
        return sibling.joint_term(original_weight(bank, paths[sibling], sibling.spec))

    with torch.inference_mode(False), torch.no_grad():
        for path, layer in layers.items():
            if path not in reservation.slots:
                raise AdapterError(f"{path}: no slots are reserved there")
            inputs = reservation.slots[path][0].spec.in_features
            if layer.spec.in_features != inputs:
                raise AdapterError(
                    f"{path}: {layer.spec.in_features} inputs expected, slots for {inputs} are reserved there"
                )
            # A layer that is not attached yet may read the bias.
            layer.__dict__.setdefault("host", bank.hosts[path])
            # The original weight: adapters that are merged now may not be when this adapter runs.
            lowered = lower_in_common if layer.adapter_type.name in reservation.common else lower
            forms[path] = lowered(layer, partial(original_weight, bank, path, layer.spec), reservation.device, term_of)
    return forms


def _has_slots(snapshot: AdapterSnapshot) -> bool:
    """Return whether any of the models has slots."""
    return any(bank.reservation is not None for bank in snapshot.banks.values())
