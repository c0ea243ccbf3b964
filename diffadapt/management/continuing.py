"""Train loaded adapters on, and give adapters another name."""

from collections.abc import Mapping

from diffadapt.errors import AdapterError
from diffadapt.loading.plan import Plan
from diffadapt.management.activation import follow_schedules
from diffadapt.management.installation import install_adapter_, remove_adapters_
from diffadapt.management.owner import Owner
from diffadapt.runtime.attach import refresh_
from diffadapt.runtime.bank import child_name
from diffadapt.runtime.dropout import Dropout
from diffadapt.runtime.gradient_flow import GradientFlow
from diffadapt.strengths.by_prefix import Strength


def install_trainable_(
    owner: Owner, name: str, planned: Plan, strength: Strength | None, *, activate: bool, allow_recompile: bool
) -> None:
    """Put planned adapters into the models, trainable and outside of slots, or do nothing; see `install_adapter_`."""
    install_adapter_(owner, name, planned, strength, activate=activate, allow_recompile=True)
    try:
        train_adapter_(owner, name, planned.dropout)
    except AdapterError:
        remove_adapters_(owner, [name])
        raise


def train_adapter_(owner: Owner, name: str, dropout: Mapping[str, Dropout] | None = None) -> None:
    """Make the parameters of a loaded adapter trainable float32 tensors; it leaves its slots.

    Args:
        dropout: component -> the dropout probabilities of its layers; those left out stay as they are.

    Raises:
        AdapterError: no such adapter, it is merged, or a quantised layer passes no right gradient on. Nothing has
            changed then.
    """
    snapshot = owner.snapshot()
    loaded = snapshot[name]
    if name in snapshot.merged:
        raise AdapterError(f"adapter {name!r} is merged into the weights; call unmerge() before training it")
    for component, adapter in loaded.components.items():
        GradientFlow(snapshot.models[component]).refuse_wrong(adapter.layers)
    for component, adapter in loaded.components.items():
        reservation = snapshot.banks[component].reservation
        if reservation is not None:
            reservation.vacate(name)
        adapter.outside_slots = True
        refresh_(snapshot.models[component])
        adapter.train_()
        if dropout is not None and component in dropout:
            for layer in adapter.layers.values():
                layer.__dict__["dropout"] = dropout[component]
    owner.changed()


def rename_adapter_(owner: Owner, old: str, new: str) -> None:
    """Give a loaded adapter another name; see `Adapters.rename`."""
    snapshot = owner.snapshot()
    adapter = snapshot[old]
    if new == old:
        return
    snapshot.refuse_name(new)
    for component in adapter.components:
        bank = snapshot.banks[component]
        children = {child_name(new) if key == child_name(old) else key: child for key, child in bank._modules.items()}
        bank._modules.clear()
        bank._modules.update(children)
        bank.merged = tuple(new if name == old else name for name in bank.merged)
        if bank.reservation is not None and old in bank.reservation.seated:
            seated = {new if name == old else name: seat for name, seat in bank.reservation.seated.items()}
            bank.reservation.seated.clear()
            bank.reservation.seated.update(seated)
    follow_schedules(owner, owner.follow)
    owner.changed()
