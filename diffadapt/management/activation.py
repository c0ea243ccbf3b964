"""Which adapters act, and how strongly: set once, restored afterwards, or advanced with the steps of a run."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.management.owner import Follow, Owner
from diffadapt.management.seating import seat_
from diffadapt.management.snapshot import Chosen
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.locks import exclusive
from diffadapt.strengths.by_prefix import Strength, is_scheduled
from diffadapt.strengths.schedules import Moment


def activate_(owner: Owner, adapters: Chosen, follow: Follow | None) -> None:
    """Make exactly these adapters active; see `Adapters.activate`."""
    snapshot = owner.snapshot()
    snapshot.refuse_merged("activate")
    wanted, strengths = snapshot.resolved(adapters)
    if follow is None and any(map(is_scheduled, wanted.values())):
        raise AdapterError(
            "a schedule follows the steps of a scheduler, which a single model does not have; "
            "use `with adapters.scheduled(..., scheduler=...)`"
        )
    seat_(snapshot, wanted)
    for name, strength in wanted.items():
        for component, adapter in snapshot[name].components.items():
            adapter.strength = strength
            adapter.set_strengths(strengths[name][component])
    snapshot.set_active_(wanted)
    keep_time(owner, follow)


def keep_time(owner: Owner, follow: Follow | None) -> None:
    """Listen to the steps of a run for as long as one of the active adapters has a schedule."""
    if follow is not None:
        scheduled = any(map(is_scheduled, owner.snapshot().active.values()))
        follow(partial(_advance_, owner) if scheduled else None)


def refuse_schedule(action: str, name: str, strength: Strength) -> None:
    """Raise `AdapterError` if the strength of adapter `name` changes during a run."""
    if is_scheduled(strength):
        raise AdapterError(f"{action}: the strength of {name!r} is a schedule; a number is expected here")


@contextmanager
def restored(owner: Owner) -> Generator[None, None, None]:
    """Hold the models of `owner` for this thread and restore the adapters on leaving.

    Every adapter is then as active and as strong as before; new ones are inactive.
    """
    with exclusive(owner.models().values()):
        yield from _restoring(owner)


def _restoring(owner: Owner) -> Generator[None, None, None]:
    states: dict[tuple[str, str], tuple[Adapter, bool, Strength, Tensor]] = {}
    calls: dict[str, tuple[int, int, bool]] = {}
    for component, bank in owner.snapshot().banks.items():
        calls[component] = bank.call.samples, bank.call.images, bank.call.asks_images
        for name, adapter in bank.adapters.items():
            states[component, name] = adapter, adapter.active, adapter.strength, adapter.gates.clone()
    try:
        yield
    finally:
        snapshot = owner.snapshot()
        for component, bank in snapshot.banks.items():
            bank.call.samples, bank.call.images, bank.call.asks_images = calls.get(component, (0, 1, True))
            for name, adapter in bank.adapters.items():
                state = states.get((component, name))
                adapter.active = state is not None and state[1]
                if state is not None and adapter is state[0]:
                    adapter.strength = state[2]
                    adapter.set_gates(state[3])
                elif state is not None:
                    # Another adapter took the name meanwhile.
                    adapter.strength = state[2]
                    strengths = snapshot.strengths(name, state[2], {component: adapter}, strict=False)
                    adapter.set_strengths(strengths[component])
        seat_(snapshot, snapshot.running)
        snapshot.refresh_()
        keep_time(owner, owner.follow)


def _advance_(owner: Owner, moment: Moment) -> None:
    """Set the strengths that schedules have at `moment`."""
    snapshot = owner.snapshot()
    for name, found in snapshot.adapters.items():
        if is_scheduled(found.strength):
            strengths = snapshot.strengths(name, found.strength, found.components, strict=False, moment=moment)
            for component, adapter in found.components.items():
                # Prompts are encoded before a run, and perhaps again before the next one.
                if not is_text_encoder(component):
                    adapter.set_strengths(strengths[component])
    snapshot.refresh_()
