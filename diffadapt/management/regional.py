"""Let adapters act in parts of the picture only."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.families.token_layouts import LAYOUTS, layout_of
from diffadapt.management.activation import restoring
from diffadapt.management.owner import Owner
from diffadapt.management.picture_masks import as_mask
from diffadapt.management.seating import seat_
from diffadapt.management.snapshot import AdapterSnapshot
from diffadapt.runtime.components import is_text_encoder
from diffadapt.runtime.regions.fields import Regions


@contextmanager
def within_regions(owner: Owner, masks: Mapping[str, Any]) -> Generator[None, None, None]:
    """Let each adapter act where its mask is 1 inside the `with` block; see `Adapters.regions`."""
    with restoring(owner):
        snapshot = owner.snapshot()
        found = _checked(snapshot, masks)
        present = {component: bank.call.regions for component, bank in snapshot.banks.items()}
        new: dict[str, Regions] = {}
        for component, before in present.items():
            here = {name: mask for name, mask in found.items() if component in snapshot[name].components}
            if here:
                layout = None if is_text_encoder(component) else _known_layout(component, snapshot.models[component])
                prepared = snapshot.banks[component].call.everywhere is not None
                masks_here = {**({} if before is None else before.masks), **here}
                new[component] = Regions(masks_here, layout, prepared=prepared)
        for component, regions in new.items():
            _refuse_other_number(regions.samples, snapshot.banks[component].call.samples)
        seat_(snapshot, [*snapshot.running, *(name for name in found if name not in snapshot.active)])
        try:
            for component, regions in new.items():
                call = snapshot.banks[component].call
                call.regions = regions
                if regions.samples and not call.samples:
                    # Rows are assigned to prompts as for `per_sample`.
                    once = is_text_encoder(component)
                    call.images, call.asks_images = 1, not once
                    call.by_rows = not owner.counts_prompts
                    call.counted = call.by_rows
            snapshot.set_active_([*snapshot.active, *found])
            yield
        finally:
            for component, bank in owner.snapshot().banks.items():
                bank.call.regions = present.get(component, bank.call.everywhere)


def prepare_regions_(snapshot: AdapterSnapshot, wanted: bool) -> None:
    """Let slots act in the whole picture for now, but such that masks need no recompile if `wanted`.

    Models of which it is not known where they have the tokens of a picture are left alone; they take no masks.
    """
    for component, bank in snapshot.banks.items():
        is_text = is_text_encoder(component)
        layout = None if is_text else layout_of(snapshot.models[component])
        ready = wanted and bank.reservation is not None and (is_text or layout is not None)
        bank.call.set_everywhere(Regions({}, layout, prepared=True) if ready else None)


def _checked(snapshot: AdapterSnapshot, masks: Any) -> dict[str, Tensor]:
    """Return the masks as tensors.

    Raises:
        AdapterError: no masks, an unknown or merged adapter, a mask that is none, or masks for different numbers of
            prompts.
    """
    if not isinstance(masks, Mapping) or not masks:
        raise AdapterError(f"regions: {masks!r}, expected a mapping from adapter names to masks")
    found: dict[str, Tensor] = {}
    given: Mapping[str, Any] = masks
    is_mixed = any(bank.call.samples for bank in snapshot.banks.values())
    for name, mask in given.items():
        loaded = snapshot[name]
        if name in snapshot.merged:
            raise AdapterError(
                f"regions: {name!r} is merged into the weights, where it acts everywhere; call unmerge() first"
            )
        if not any(adapter.layers for adapter in loaded.components.values()):
            raise AdapterError(f"regions: {name!r} has learned tokens only, which act wherever the prompt has them")
        if is_mixed and not loaded.active:
            raise AdapterError(f"regions: {name!r} is in none of the mixes of per_sample; add it to one of them")
        found[name] = as_mask(name, mask)
    numbers = {len(mask) for mask in found.values()} - {1}
    if len(numbers) > 1:
        raise AdapterError(
            f"regions: masks for {' and for '.join(map(str, sorted(numbers)))} prompts; expected one mask for all "
            "prompts, or one for each"
        )
    return found


def _known_layout(component: str, model: nn.Module) -> Any:
    layout = layout_of(model)
    if layout is None:
        raise AdapterError(
            f"regions: {component} is a {type(model).__name__}, and it is not known where its layers have the tokens "
            f"of a picture; regions work on text encoders and on {', '.join(sorted(LAYOUTS))}"
        )
    return layout


def _refuse_other_number(masks: int, mixes: int) -> None:
    """Raise `AdapterError` if masks and mixes are for different numbers of prompts."""
    if masks and mixes and masks != mixes:
        raise AdapterError(f"regions: masks for {masks} prompts, but per_sample has mixes for {mixes}")
