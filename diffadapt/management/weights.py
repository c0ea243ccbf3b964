"""Merge loaded adapters into the weights of the models, and undo it."""

from collections.abc import Generator
from contextlib import contextmanager, suppress

from diffadapt.errors import AdapterError
from diffadapt.management.activation import refuse_schedule
from diffadapt.management.owner import Owner
from diffadapt.management.seating import seat_
from diffadapt.merging.keeping import Keeping
from diffadapt.merging.merge import merge_, unmerge_
from diffadapt.merging.undo_from_file import BaseFiles, open_base_files
from diffadapt.runtime.locks import exclusive


def merge_adapters_(owner: Owner, names: tuple[str, ...], compact: bool | None, base_files: BaseFiles) -> None:
    """Merge the adapters `names`, or all active ones if empty, into the weights; see `Adapters.merge`."""
    snapshot = owner.snapshot()
    if any(bank.call.samples for bank in snapshot.banks.values()):
        raise AdapterError("merge: inside per_sample every sample has its own strengths; leave the block first")
    chosen = names or tuple(snapshot.running)
    regional = [bank.call.regions for bank in snapshot.banks.values() if bank.call.regions is not None]
    if any(name in regions.masks for name in chosen for regions in regional):
        raise AdapterError("merge: a merged adapter acts everywhere; leave the block of regions first")
    if not chosen:
        raise AdapterError("nothing to merge: no adapter is active, or all that are active are merged already")
    for name in chosen:
        if name in snapshot.merged:
            raise AdapterError(f"adapter {name!r} is merged already; call unmerge() first")
        refuse_schedule("merge", name, snapshot[name].strength)
    components = {component for name in chosen for component in snapshot[name].components}
    models = {component: model for component, model in snapshot.models.items() if component in components}
    files = open_base_files(models, base_files)
    merge_(snapshot.models, chosen, Keeping(compact, files))
    for name in chosen:
        for adapter in snapshot[name].components.values():
            adapter.active = True


def unmerge_adapters_(owner: Owner) -> None:
    """Undo every merge; see `Adapters.unmerge`."""
    merged = owner.snapshot().merged
    if not merged:
        return
    for model in owner.models().values():
        unmerge_(model)
    snapshot = owner.snapshot()
    # Other adapters may have taken their seats; an adapter without a seat runs outside the slots.
    with suppress(AdapterError):
        seat_(snapshot, merged, staying=snapshot.active)
    snapshot.refresh_()


@contextmanager
def unmerged(owner: Owner) -> Generator[None, None, None]:
    """Hold the models of `owner` for this thread, unmerge all adapters, and merge them again on leaving."""
    with exclusive(owner.models().values()):
        merged, keeping = owner.snapshot().merged, Keeping.of(owner.models())
        unmerge_adapters_(owner)
        try:
            yield
        finally:
            if merged:
                merge_(owner.models(), merged, keeping)
