"""One way for a planned adapter into the models: beside the weights, or merged in the place of a merged one."""

from collections.abc import Generator
from contextlib import contextmanager

from diffadapt.errors import AdapterError
from diffadapt.loading.attach_plan import attach_all_
from diffadapt.loading.plan import Plan
from diffadapt.management.activation import keep_time, refuse_schedule
from diffadapt.management.owner import Owner
from diffadapt.management.seating import find_room
from diffadapt.management.snapshot import AdapterSnapshot, LoadedAdapter
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.merge import refuse_mixture, remerged
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.foreign_hooks import execution_device
from diffadapt.runtime.slots.reservation import Arrangement
from diffadapt.strengths.by_prefix import Strength


def install_(
    owner: Owner,
    name: str,
    planned: Plan,
    strength: Strength,
    *,
    activate: bool = True,
    allow_recompile: bool = False,
    old: LoadedAdapter | None = None,
    keeps_strength: bool = False,
) -> None:
    """Put planned adapters into the models as `name`, in all components; or raise, and nothing has changed.

    Args:
        allow_recompile: whether they may run outside the slots where the slots have no room.
        old: the adapter that has this name now. If it is merged, the new one is merged in its place.
        keeps_strength: the strength is that of `old`, whose prefixes need not suit the new adapter.
    """
    snapshot, adapters = owner.snapshot(), planned.adapters
    merged = name in snapshot.merged
    if merged:
        refuse_schedule("hotswap", name, strength)
    strengths = snapshot.strengths(name, strength, adapters, strict=not keeps_strength)
    for adapter in adapters.values():
        adapter.active = activate
    after = _after(snapshot, name, adapters)
    for component, bank in snapshot.banks.items():
        if bank.merged:
            refuse_mixture(component, after[component], {*bank.merged, *((name,) if merged else ())})
    arrangements, outside = dict[str, Arrangement](), set[str]()
    if merged:
        _refuse_other_inputs(name, [*adapters.values(), *(old.components.values() if old else ())])
    else:
        layers = {component: adapter.layers for component, adapter in adapters.items() if adapter.layers}
        arrangements, outside = find_room(snapshot, name, layers, activate, allow_recompile, replacing=old is not None)
    for component, adapter in adapters.items():
        if component not in arrangements and planned.device is not None:
            # It was prefetched into CPU memory and runs where its model does. If there is no memory for it, that shows
            # before anything has changed.
            adapter.to(execution_device(planned.targets[component].all))
        adapter.strength, adapter.outside_slots = strength, component in outside
        adapter.set_strengths(strengths[component])
    with _merged(snapshot, name, planned, after, merged):
        attach_all_(snapshot.models, name, planned, replacing=old is not None)
    snapshot = owner.snapshot()
    for component, bank in snapshot.banks.items():
        if component in arrangements:
            arrangements[component].carry_out()
        elif bank.reservation is not None:
            bank.reservation.vacate(name)
    snapshot.refresh_()
    keep_time(owner, owner.follow)
    owner.changed()


def _after(snapshot: AdapterSnapshot, name: str, adapters: dict[str, Adapter]) -> dict[str, dict[str, Adapter]]:
    """Return the adapters of every model as they will be, by component and name."""
    found: dict[str, dict[str, Adapter]] = {}
    for component in snapshot.models:
        bank = snapshot.banks.get(component)
        found[component] = {} if bank is None else bank.adapters
        if component in adapters:
            found[component][name] = adapters[component]
        else:
            found[component].pop(name, None)
    return found


def _refuse_other_inputs(name: str, adapters: list[Adapter]) -> None:
    if any(layer.widens for adapter in adapters for layer in adapter.layers.values()):
        raise AdapterError(f"hotswap: {name!r} is merged, and a layer's inputs would change; unmerge() first")


@contextmanager
def _merged(
    snapshot: AdapterSnapshot, name: str, planned: Plan, after: dict[str, dict[str, Adapter]], merges: bool
) -> Generator[None, None, None]:
    """Exchange what is merged, if that is wanted, around the body, which attaches the new adapters."""
    if not merges:
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
