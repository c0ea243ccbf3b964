"""Attach adapters to a model and detach them again. The only file that changes a foreign module.

What attaching changes, and detaching puts back:

* the root model gets one child, the bank, that owns all its adapters, and two forward hooks for per-call scales;
* `layer.__class__` of an adapted layer becomes a cached subclass `(Adapted, type(layer))`. The layer keeps its
  identity: `isinstance`, `.weight`, its path and its state-dict keys are unchanged;
* the layer's `__dict__` gets one tuple, the adapter layers that are active on it;
* the layer that reads latents may get more inputs (`widen.py`).

`__call__` is overridden and not `forward`: whatever diffusers and accelerate install as the instance's `forward`
(casting, offloading) runs inside, in whichever order it was installed.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import ACTIVE, TOKENS, Adapted, Extended
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import BANK, AdapterLayer
from diffadapt.runtime.bank import RESERVED, Bank, bank_of
from diffadapt.runtime.class_mixing import mixed, own_class
from diffadapt.runtime.input_width import fit_input_width_
from diffadapt.runtime.slots.reservation import Reservation


def attach_(
    model: nn.Module, name: str, adapter: Adapter, hosts: Mapping[str, nn.Module], *, replacing: bool = False
) -> None:
    """Register `adapter` at the root of `model` and make its layers call it from the next `refresh_` on.

    Args:
        hosts: module path -> layer of the model, for every path of `adapter.layers`.
        replacing: the adapter of this name, if there is one, goes; else the name must be free.

    Raises:
        AdapterError: the name is taken, or the class or the inputs of a layer cannot be changed. Nothing is changed
            then.
    """
    bank = bank_of(model)
    if bank is not None and name in bank._modules and not replacing:
        raise AdapterError(f"adapter {name!r} exists already; remove it first or pass another name")
    present: dict[str, Adapter] = {} if bank is None else bank.adapters
    _level_(model, {**present, name: adapter}.values(), bank)
    try:
        bank = _adapt_(model, {path: hosts[path] for path in adapter.layers})
    except AdapterError:
        _level_(model, present.values(), bank)
        raise
    for path, layer in adapter.layers.items():
        layer.__dict__["call"] = bank.call
        layer.__dict__["host"] = hosts[path]
    if adapter.training != model.training:
        adapter.train(model.training)
    bank._modules[name] = adapter


def detach_(model: nn.Module, name: str) -> None:
    """Remove adapter `name`. With the last one the model is what it was before the first, unless it has slots.

    Raises:
        AdapterError: a layer that was made wider for it cannot be changed back now. Nothing is changed then.
    """
    bank = bank_of(model)
    if bank is None or name not in bank._modules:
        return
    _level_(model, [adapter for other, adapter in bank.adapters.items() if other != name], bank)
    del bank._modules[name]
    if bank.reservation is not None:
        bank.reservation.vacate(name)
    refresh_(model)
    _release_unused_(model, bank)


def reserve_(model: nn.Module, reservation: Reservation, hosts: Mapping[str, nn.Module]) -> None:
    """Make the layers of `model` run the slots of `reservation`, in the place of those it had.

    Args:
        hosts: module path -> layer of the model, for every path of `reservation.slots`.

    Raises:
        AdapterError: the class of a layer cannot be changed. Nothing is changed then.
    """
    bank = _adapt_(model, {path: hosts[path] for path in reservation.slots})
    for path, slots in reservation.slots.items():
        for slot in slots:
            slot.__dict__["call"] = bank.call
            slot.__dict__["host"] = hosts[path]
    bank._modules[RESERVED] = reservation.train(model.training)
    bank._outside = None
    refresh_(model)


def unreserve_(model: nn.Module) -> None:
    """Remove the slots; the adapters in them run as parameters of their own again, which a compiled model notices."""
    bank = bank_of(model)
    if bank is None or bank.reservation is None:
        return
    _level_(model, bank.adapters.values(), bank, reserved=False)
    del bank._modules[RESERVED]
    bank._outside = None
    refresh_(model)
    _release_unused_(model, bank)


def refresh_(model: nn.Module) -> None:
    """Make exactly the adapters act that are active and not merged: those with a seat through their slots, others as
    adapter layers that every layer calls in the order in which they were attached.
    """
    bank = bank_of(model)
    if bank is None:
        return
    reservation = bank.reservation
    acting = {name: adapter for name, adapter in bank.adapters.items() if adapter.active and name not in bank.merged}
    seated = {} if reservation is None else reservation.seated
    if reservation is not None:
        reservation.open({name: adapter.gates for name, adapter in acting.items() if name in seated})
    beside = tuple(adapter for name, adapter in acting.items() if name not in seated)
    if bank._outside is not None and len(beside) == len(bank._outside):
        if all(adapter is before for adapter, before in zip(beside, bank._outside, strict=True)):
            return
    slots = {} if reservation is None else reservation.slots
    active: dict[str, tuple[AdapterLayer, ...]] = {path: slots.get(path, ()) for path in bank.hosts}
    for adapter in beside:
        for path, layer in adapter.layers.items():
            active[path] = (*active[path], layer)
    for path, layers in active.items():
        host = bank.hosts[path]
        if host.__dict__[ACTIVE] != layers:
            host.__dict__[ACTIVE] = layers
    bank._outside = beside


def _adapt_(model: nn.Module, hosts: Mapping[str, nn.Module]) -> Bank:
    """Prepare layers for carrying adapter layers: all of them, or none if one refuses."""
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, host in hosts.items():
        if ACTIVE not in host.__dict__:
            base = type(host)
            try:
                if not isinstance(host, Adapted):
                    host.__class__ = mixed(base, Adapted)
            except TypeError as error:
                for changed, before in classes:
                    changed.__class__ = before
                    changed.__dict__.pop(ACTIVE, None)
                raise AdapterError(f"{path}: its class cannot carry an adapter ({error})") from error
            classes.append((host, base))
            host.__dict__[ACTIVE] = ()
    bank = bank_of(model)
    if bank is None:
        bank = Bank()
        bank.train(model.training)
        model._modules[BANK] = bank
        model.register_forward_pre_hook(bank.before_call, with_kwargs=True)
        model.register_forward_hook(bank.after_call, with_kwargs=True)
    new = {path: host for path, host in hosts.items() if path not in bank.hosts}
    bank.hosts.update(new)
    bank.attentions.update(_attentions(model, new))
    return bank


def _level_(model: nn.Module, adapters: Collection[Adapter], bank: Bank | None, *, reserved: bool = True) -> None:
    """Make the model's input layer as wide as these adapters, and with `reserved` its slots, need it."""
    slots = bank.reservation.slots if bank is not None and bank.reservation is not None and reserved else {}
    fit_input_width_(model, [*(adapter.layers for adapter in adapters), slots], [] if bank is None else bank.undo)


def _release_unused_(model: nn.Module, bank: Bank) -> None:
    """Give back layers that nothing is left on and, when nothing at all is left, the bank and its hooks."""
    unused = set(bank.hosts) if bank.reservation is None else bank.hosts.keys() - bank.reservation.slots.keys()
    for adapter in bank.adapters.values() if unused else ():
        unused.difference_update(adapter.layers)
    for path in unused:
        _release_(bank.hosts.pop(path))
        bank.attentions.pop(path, None)
    if not bank._modules:
        del model._modules[BANK]
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is bank]:
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                model._forward_hooks_with_kwargs.pop(key, None)


def extend_(host: nn.Module, tokens: tuple[nn.Module, ...]) -> None:
    """Make the token embedding `host` look up further ids elsewhere; without `tokens` it is as before.

    Args:
        tokens: each with `holds(ids)`, and called with ids and the embeddings so far.

    Raises:
        AdapterError: the class of the layer cannot be changed.
    """
    if host.__dict__.get(TOKENS, ()) == tokens:
        return
    base = own_class(host)
    mixin = Extended if tokens else Adapted if ACTIVE in host.__dict__ else None
    try:
        host.__class__ = base if mixin is None else mixed(base, mixin)
    except TypeError as error:
        raise AdapterError(f"a {type(host).__name__} cannot get further tokens ({error})") from error
    if tokens:
        host.__dict__[TOKENS] = tokens
    else:
        del host.__dict__[TOKENS]


def _attentions(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    parents: dict[str, nn.Module] = {}
    for path in paths:
        parent_path = path.rpartition(".")[0]
        if parent_path not in parents:
            parent = model
            for name in filter(None, parent_path.split(".")):
                parent = parent._modules[name] or parent
            parents[parent_path] = parent
        if hasattr(parents[parent_path], "fused_projections"):
            yield path, parents[parent_path]


def _release_(host: nn.Module) -> None:
    host.__dict__.pop(ACTIVE, None)
    if isinstance(host, Adapted) and not isinstance(host, Extended):
        host.__class__ = own_class(host)
