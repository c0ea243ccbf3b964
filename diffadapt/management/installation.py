"""Put planned adapters into the models, next to the weights or merged into them, and remove them again."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from diffadapt.errors import AdapterError
from diffadapt.loading.attach_plan import attach_all_, detach_all_
from diffadapt.loading.plan import Plan
from diffadapt.management.activation import follow_schedules, refuse_schedule
from diffadapt.management.owner import Owner
from diffadapt.management.seating import find_seats
from diffadapt.management.snapshot import AdapterSnapshot, LoadedAdapter
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.merge import refuse_mixture, remerged
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.foreign_hooks import execution_device
from diffadapt.runtime.slots.reservation import Arrangement
from diffadapt.strengths.by_prefix import Strength


def install_adapter_(
    owner: Owner,
    name: str,
    planned: Plan,
    strength: Strength | None,
    *,
    activate: bool = True,
    allow_recompile: bool = False,
    old: LoadedAdapter | None = None,
) -> None:
    """Put planned adapters into the models under `name`, in all components or, if one refuses, in none.

    Args:
        strength: strength of the new adapter; `None` for that of `old`, whose prefixes need not match the new layers.
        activate: whether the adapter acts at once.
        allow_recompile: whether it may run outside the slots where they have no room.
        old: the adapter that has this name now, to be replaced. If it is merged, the new one is merged in its place.

    Raises:
        AdapterError: see `Adapters.load` and `Adapters.hotswap`. Nothing has changed then.
    """
    snapshot, adapters = owner.snapshot(), planned.adapters
    is_merged = name in snapshot.merged
    inherits = strength is None
    if strength is None:
        assert old is not None
        strength = old.strength
    if is_merged:
        refuse_schedule("hotswap", name, strength)
    strengths = snapshot.strengths(name, strength, adapters, strict=not inherits)
    for adapter in adapters.values():
        adapter.active = activate
    after = _adapters_after(snapshot, name, adapters)
    for component, bank in snapshot.banks.items():
        if bank.merged:
            refuse_mixture(component, after[component], {*bank.merged, *((name,) if is_merged else ())})
    arrangements, outside = dict[str, Arrangement](), set[str]()
    if is_merged:
        _refuse_other_inputs(name, [*adapters.values(), *(old.components.values() if old else ())])
    else:
        layers = {component: adapter.layers for component, adapter in adapters.items() if adapter.layers}
        arrangements, outside = find_seats(snapshot, name, layers, activate, allow_recompile, replacing=old is not None)
    for component, adapter in adapters.items():
        if component not in arrangements and planned.device is not None:
            # It was prefetched into CPU memory, but runs where its model does. Move it now: if there is no memory for
            # it, this fails before anything has changed.
            adapter.to(execution_device(planned.targets[component].all))
        adapter.strength, adapter.outside_slots = strength, component in outside
        adapter.set_strengths(strengths[component])
    with _merged_in_place(snapshot, name, planned, after, is_merged):
        attach_all_(snapshot.models, name, planned, replacing=old is not None)
    snapshot = owner.snapshot()
    for component, bank in snapshot.banks.items():
        if component in arrangements:
            arrangements[component].carry_out()
        elif bank.reservation is not None:
            bank.reservation.vacate(name)
    snapshot.refresh_()
    follow_schedules(owner, owner.follow)
    owner.changed()


def remove_adapters_(owner: Owner, names: Iterable[str]) -> None:
    """Remove adapters with their tokens from all components; see `Adapters.remove`."""
    snapshot, names = owner.snapshot(), list(names)
    for name in names:
        if snapshot[name].name in snapshot.merged:
            raise AdapterError(f"adapter {name!r} is merged into the weights; call unmerge() before remove()")
    for name in names:
        detach_all_(snapshot.models, name)
    follow_schedules(owner, owner.follow)
    owner.changed()


def _adapters_after(
    snapshot: AdapterSnapshot, name: str, adapters: dict[str, Adapter]
) -> dict[str, dict[str, Adapter]]:
    """Return component -> name -> adapter, as it will be once `adapters`, by component, are attached as `name`."""
    after: dict[str, dict[str, Adapter]] = {}
    for component in snapshot.models:
        bank = snapshot.banks.get(component)
        after[component] = {} if bank is None else bank.adapters
        if component in adapters:
            after[component][name] = adapters[component]
        else:
            after[component].pop(name, None)
    return after


def _refuse_other_inputs(name: str, adapters: list[Adapter]) -> None:
    """Raise `AdapterError` if one of the adapters changes how many inputs a layer has."""
    if any(layer.widens for adapter in adapters for layer in adapter.layers.values()):
        raise AdapterError(f"hotswap: {name!r} is merged, and a layer's inputs would change; unmerge() first")


@contextmanager
def _merged_in_place(
    snapshot: AdapterSnapshot, name: str, planned: Plan, after: dict[str, dict[str, Adapter]], is_merged: bool
) -> Generator[None, None, None]:
    """If the old adapter is merged, merge the new one in its place around the block, which attaches the new one."""
    if not is_merged:
        yield
        return
    wanted: dict[str, dict[str, Adapter]] = {}
    for component, adapters in after.items():
        bank = snapshot.banks.get(component)
        merged = {name, *(() if bank is None else bank.merged)}
        wanted[component] = {other: adapter for other, adapter in adapters.items() if other in merged}
    hosts = {component: planned.hosts(component) for component in planned.adapters}
    with remerged(snapshot.models, wanted, Keeping.of(snapshot.models), hosts=hosts):
        yield
