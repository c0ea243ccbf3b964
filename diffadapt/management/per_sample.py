"""Give every sample of a batch its own mix of adapters."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from diffadapt.errors import AdapterError
from diffadapt.management.activation import (
    follow_of,
    follow_schedules,
    refuse_without_scheduler,
    restoring,
)
from diffadapt.management.owner import Owner
from diffadapt.management.seating import seat_
from diffadapt.management.snapshot import AdapterSnapshot, Chosen
from diffadapt.runtime.components import is_text_encoder
from diffadapt.strengths.by_prefix import SampleStrengths


@contextmanager
def mixed_per_sample(
    owner: Owner, mixes: Sequence[Chosen], images: int | None, scheduler: Any = None
) -> Generator[None, None, None]:
    """Give every sample of a batch its own mix inside the `with` block; see `Adapters.per_sample`."""
    if not mixes:
        raise AdapterError("per_sample: no mixes, expected one for every prompt")
    follow = follow_of(owner, scheduler)
    try:
        with restoring(owner):
            _mix_(owner, mixes, images, follow)
            follow_schedules(owner, follow)
            yield
    finally:
        follow_schedules(owner, follow)


def _mix_(owner: Owner, mixes: Sequence[Chosen], images: int | None, follow: Any) -> None:
    """Set the strengths of all adapters for every sample, and make exactly those act that are in a mix."""
    snapshot = owner.snapshot()
    snapshot.refuse_merged("per_sample")
    wanted = [snapshot.resolve(mix)[0] for mix in mixes]
    for mix in wanted:
        refuse_without_scheduler(follow, mix.values(), "per_sample(..., scheduler=...)")
    _refuse_slots(snapshot, len(mixes))
    names = list(dict.fromkeys(name for mix in wanted for name in mix))
    for name in names:
        _refuse_experts(snapshot, name)
    seat_(snapshot, names)
    for name in names:
        strength = SampleStrengths(mix.get(name, 0.0) for mix in wanted)
        components = snapshot[name].components
        strengths = snapshot.strengths(name, strength, components)
        for component, adapter in components.items():
            adapter.strength = strength
            adapter.set_strengths(strengths[component])
    concerned = {component for name in names for component in snapshot[name].components}
    for component, bank in snapshot.banks.items():
        # A text encoder runs every prompt once, however many images are drawn of it.
        once = is_text_encoder(component)
        bank.call.samples = len(mixes) if component in concerned else 0
        bank.call.images = 1 if once else images or 1
        bank.call.asks_images = images is None and not once
        bank.call.by_rows = not owner.counts_prompts
        bank.call.counted = bank.call.by_rows or component not in concerned
        bank.call.row_factors.clear()
    snapshot.set_active_(names)


def _refuse_slots(snapshot: AdapterSnapshot, count: int) -> None:
    """Raise `AdapterError` if a model has slots, and they are not for `count` samples."""
    for component, bank in snapshot.banks.items():
        reservation = bank.reservation
        if reservation is not None and reservation.samples < count:
            raise AdapterError(
                f"per_sample: {count} mixes, but the slots of {component} are for "
                f"{reservation.samples or 'no'} samples; call prepare_hotswap(..., samples={count}) "
                "before compiling"
            )


def _refuse_experts(snapshot: AdapterSnapshot, name: str) -> None:
    """Raise `AdapterError` if adapter `name` is on routed experts, whose input rows are tokens of any sample."""
    for component, adapter in snapshot[name].components.items():
        routed = next((path for path in adapter.layers if "experts" in path.split(".")), None)
        if routed is not None:
            raise AdapterError(
                f"per_sample: {component}.{routed}, which {name!r} changes, is an expert, and its input mixes tokens "
                "of all samples; run the samples one by one"
            )
