"""Which adapters act and how strongly: set for good, for a `with` block, or at every step of a run."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from diffadapt.errors import AdapterError
from diffadapt.management.owner import Follow, Owner
from diffadapt.management.seating import seat_
from diffadapt.management.snapshot import Chosen
from diffadapt.management.upcoming import UpcomingAdapter, add_, begin_due_, is_awaited
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.locks import exclusive
from diffadapt.strengths import scheduler_clock
from diffadapt.strengths.by_prefix import SampleStrengths, Strength, check_strength, is_scheduled
from diffadapt.strengths.schedules import Moment


def activate_(owner: Owner, adapters: Chosen, follow: Follow | None) -> None:
    """Make exactly these adapters active; see `Adapters.activate`.

    Args:
        follow: connects the schedulers that schedules follow to a listener; `None` if there are none.
    """
    snapshot = owner.snapshot()
    snapshot.refuse_merged("activate")
    wanted, strengths = snapshot.resolve(adapters)
    refuse_without_scheduler(follow, wanted.values(), "with adapters.scheduled(..., scheduler=...)")
    seat_(snapshot, wanted)
    for name, strength in wanted.items():
        for component, adapter in snapshot[name].components.items():
            adapter.strength = strength
            adapter.set_strengths(strengths[name][component])
    snapshot.set_active_(wanted)
    follow_schedules(owner, follow)


@contextmanager
def scheduled(owner: Owner, adapters: Chosen, scheduler: Any = None) -> Generator[None, None, None]:
    """Make exactly these adapters active inside the `with` block; see `Adapters.scheduled`."""
    follow = follow_of(owner, scheduler)
    try:
        with restoring(owner):
            activate_(owner, adapters, follow)
            yield
    finally:
        follow_schedules(owner, follow)


def follow_of(owner: Owner, scheduler: Any) -> Follow | None:
    """Return what connects schedules to `scheduler` or, if that is `None`, to the schedulers of `owner`."""
    if scheduler is None:
        return owner.follow
    return partial(scheduler_clock.follow, scheduler, next(iter(owner.models().values())))


def refuse_without_scheduler(follow: Follow | None, strengths: Iterable[Strength], remedy: str) -> None:
    """Raise `AdapterError` if one of the strengths is a schedule, and there is nothing to follow."""
    if follow is None and any(map(is_scheduled, strengths)):
        raise AdapterError(
            f"a schedule follows the steps of a scheduler, which a single model does not have; use `{remedy}`"
        )


def follow_schedules(owner: Owner, follow: Follow | None) -> None:
    """Listen to the steps of runs if an active adapter has a schedule or one is to begin, and else stop listening."""
    if follow is not None:
        listens = is_awaited(owner) or any(map(is_scheduled, owner.snapshot().active.values()))
        follow(partial(_advance_, owner, follow) if listens else None)


def await_(owner: Owner, upcoming: UpcomingAdapter, strength: Strength, follow: Follow | None) -> None:
    """Start reading an upcoming adapter, and let it wait for the run of `owner` that begins next.

    Args:
        strength: the strength that it will have.
        follow: connects the schedulers whose steps it follows to a listener; `None` if there are none.

    Raises:
        AdapterError: there are none, or the name or the strength is none. It is not read then.
    """
    if follow is None:
        raise AdapterError("begin: a single model has no steps to follow; use `begin(..., scheduler=...)`")
    check_strength(upcoming.name or "", strength)
    upcoming.start()
    try:
        # Another thread may be drawing; meanwhile the file is read.
        with exclusive(owner.models().values()):
            if upcoming.name is not None:
                owner.snapshot().refuse_name(upcoming.name)
            add_(owner, upcoming)
            follow_schedules(owner, follow)
    except BaseException:
        upcoming.cancel()
        raise


def refuse_schedule(action: str, name: str, strength: Strength) -> None:
    """Raise `AdapterError` if the strength of adapter `name` is a schedule, or another one for every sample.

    Args:
        action: what was asked for, in the message.
    """
    if isinstance(strength, SampleStrengths):
        raise AdapterError(f"{action}: inside per_sample every sample has its own strengths; leave the block first")
    if is_scheduled(strength):
        raise AdapterError(f"{action}: the strength of {name!r} is a schedule; a number is expected here")


class _AdapterState(NamedTuple):
    """What `restoring` restores of one adapter on one model."""

    adapter: Adapter
    active: bool
    strength: Strength
    gates: Tensor


@contextmanager
def restoring(owner: Owner) -> Generator[None, None, None]:
    """Hold the models of `owner` for this thread, and on leaving restore which adapters act and how strongly.

    Adapters that were loaded in between are inactive then.
    """
    with exclusive(owner.models().values()):
        states: dict[tuple[str, str], _AdapterState] = {}
        calls: dict[str, tuple[int, int, bool, bool]] = {}
        for component, bank in owner.snapshot().banks.items():
            call = bank.call
            calls[component] = call.samples, call.images, call.asks_images, call.counted
            for name, adapter in bank.adapters.items():
                state = _AdapterState(adapter, adapter.active, adapter.strength, adapter.gates.clone())
                states[component, name] = state
        try:
            yield
        finally:
            _restore_(owner, states, calls)


def _restore_(
    owner: Owner, states: dict[tuple[str, str], _AdapterState], calls: dict[str, tuple[int, int, bool, bool]]
) -> None:
    """Write back the states of adapters by component and name, and the samples of calls by component."""
    snapshot = owner.snapshot()
    for component, bank in snapshot.banks.items():
        call = bank.call
        call.samples, call.images, call.asks_images, call.counted = calls.get(component, (0, 1, True, True))
        call.row_factors.clear()
        for name, adapter in bank.adapters.items():
            state = states.get((component, name))
            adapter.active = state is not None and state.active
            if state is None:
                continue
            adapter.strength = state.strength
            if adapter is state.adapter:
                adapter.set_gates(state.gates)
            else:
                # The name was given to another adapter in between, perhaps with other layers.
                strengths = snapshot.strengths(name, state.strength, {component: adapter}, strict=False)
                adapter.set_strengths(strengths[component])
    seat_(snapshot, snapshot.running)
    snapshot.refresh_()
    follow_schedules(owner, owner.follow)


def _advance_(owner: Owner, follow: Follow, moment: Moment) -> None:
    """Let adapters act that begin at `moment`, and set the strengths that schedules have then."""
    try:
        begin_due_(owner, moment)
    finally:
        # One that was awaited may have begun or been cancelled, or waits again.
        follow_schedules(owner, follow)
    snapshot = owner.snapshot()
    for name, loaded in snapshot.adapters.items():
        if loaded.active and is_scheduled(loaded.strength):
            if isinstance(loaded.strength, SampleStrengths):
                loaded.strength.refuse_missing_steps(name, moment.steps)
            strengths = snapshot.strengths(name, loaded.strength, loaded.components, strict=False, moment=moment)
            for component, adapter in loaded.components.items():
                # Prompts are encoded before a run, and perhaps again before the next one.
                if not is_text_encoder(component):
                    adapter.set_strengths(strengths[component])
    snapshot.refresh_()
