"""Attach adapters and slots to a model and detach them: which code runs when the model and its layers are called.

Attaching changes the following, and detaching puts it back:

* The model gets one child, the bank, which owns all its adapters, and two forward hooks.
* The class of an adapted layer becomes a cached subclass `(Adapted, type(layer))`. The layer keeps its identity:
  `isinstance`, `.weight`, its path and its state-dict keys are unchanged.
* The layer's `__dict__` gets one tuple, the adapter layers that are active on it.
* A token embedding with learned tokens gets `Extended` in place of `Adapted`, and a second tuple, the learned tokens.

`__call__` is overridden and not `forward`. Whatever diffusers and accelerate install as the instance's `forward`
(casting, offloading) therefore runs inside, in whichever order it was installed.

Apart from `replaced_layers`, which moves all this to a layer that replaced another, no other module changes the class,
the children or the hooks of a model's module. The rest of what diffadapt changes in objects of other libraries has one
place each:

| object | what is changed | where |
|---|---|---|
| the layer that reads latents, and the model's config | weight, `in_features`, config entries | `input_width` |
| groups of diffusers' group offloading to disk | the adapters in them | `disk_offload` |
| modules with gradient checkpointing | the checkpointing function in their `__dict__`, during a call | `bank` |
| weights and biases | their content, in place | `merging/` |
| modules that own adapted bare parameters | the changed parameters in their `__dict__`, during a call | `compose` |
| tokenizers | their added tokens and their class | `tokens/vocabulary` |
| schedulers | stand-ins for methods, in their `__dict__` | `strengths/scheduler_clock` |
| pipelines | stand-ins for `encode_prompt` and `progress_bar`, in their `__dict__` | `pipelines/call_hooks` |
| classes of pipelines and models | stand-ins for their adapter methods | `pipelines/adapter_methods` |
| pipeline classes | `load_adapter` and `adapters` | `pipelines/installation` |
"""

from collections.abc import Collection, Iterable, Mapping
from weakref import ref

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import ACTIVE, TOKENS, Extended, carry_, release_
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import BANK, AdapterLayer
from diffadapt.runtime.bank import RESERVED, Bank, bank_of, child_name, fusible_attentions
from diffadapt.runtime.call_arguments import Clock
from diffadapt.runtime.call_checks import check_call
from diffadapt.runtime.class_mixing import unmix_
from diffadapt.runtime.foreign_hooks import layer_devices
from diffadapt.runtime.inference_mode import ordinary_tensors
from diffadapt.runtime.input_width import fit_input_width_
from diffadapt.runtime.regions.assignment import assign_regions_
from diffadapt.runtime.replaced_layers import Watch, present_hosts, refuse_problems
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.runtime.text_cache import forget_text_
from diffadapt.types.adapter_type import UNTIL


def attach_(
    model: nn.Module, name: str, adapter: Adapter, hosts: Mapping[str, nn.Module], *, replacing: bool = False
) -> None:
    """Register `adapter` in the bank of `model` and prepare its layers. It acts from the next `refresh_` on.

    Args:
        hosts: module path -> layer of the model, for every path of `adapter.layers`.
        replacing: whether an adapter of this name is replaced. Otherwise the name must be free.

    Raises:
        AdapterError: the name is taken, or the class or the inputs of a layer cannot be changed. Nothing is changed
            then.
    """
    bank = bank_of(model)
    if bank is not None and name in bank.adapters and not replacing:
        raise AdapterError(f"adapter {name!r} exists already; remove it first or pass another name")
    if bank is not None:
        refuse_problems(bank.find_layers(model))
    hosts = present_hosts(model, hosts, adapter.layers, {} if bank is None else bank.hosts)
    clock = _clock_of(model, adapter.layers.values())
    present: dict[str, Adapter] = {} if bank is None else bank.adapters
    _fit_input_width_(model, {**present, name: adapter}.values(), bank)
    try:
        bank = _adapt_(model, hosts)
    except AdapterError:
        _fit_input_width_(model, present.values(), bank)
        raise
    for path, layer in adapter.layers.items():
        layer.__dict__["call"] = bank.call
        layer.__dict__["host"] = hosts[path]
    devices = layer_devices(model, hosts)
    if devices:
        adapter.place_(devices)
    if adapter.training != model.training:
        adapter.train(model.training)
    bank._modules[child_name(name)] = adapter
    bank.call.clock = clock or bank.call.clock


def detach_(model: nn.Module, name: str) -> None:
    """Remove adapter `name`, if it exists. Without adapters and slots, the model is as it was before the first adapter.

    Raises:
        AdapterError: the adapter needs more inputs than the layer has by itself, and the layer cannot be changed back
            now. Nothing is changed then.
    """
    bank = bank_of(model)
    if bank is None or name not in bank.adapters:
        return
    bank.find_layers(model)
    _fit_input_width_(model, [adapter for other, adapter in bank.adapters.items() if other != name], bank)
    del bank._modules[child_name(name)]
    if bank.reservation is not None:
        bank.reservation.vacate(name)
    refresh_(model)
    _release_unused_(model, bank)


def reserve_(model: nn.Module, reservation: Reservation, hosts: Mapping[str, nn.Module]) -> None:
    """Make the layers of `model` run the slots of `reservation`, which replaces an earlier one.

    Args:
        hosts: module path -> layer of the model, for every path of `reservation.slots`.

    Raises:
        AdapterError: the class of a layer cannot be changed. Nothing is changed then.
    """
    bank = bank_of(model)
    if bank is not None:
        refuse_problems(bank.find_layers(model))
    hosts = present_hosts(model, hosts, {path: slots[0] for path, slots in reservation.slots.items()}, {})
    clock = _clock_of(model, (slot for slots in reservation.slots.values() for slot in slots))
    bank = _adapt_(model, hosts)
    for path, slots in reservation.slots.items():
        for slot in slots:
            slot.__dict__["call"] = bank.call
            slot.__dict__["host"] = hosts[path]
    devices = layer_devices(model, hosts)
    if devices:
        reservation.place_(devices)
    bank._modules[RESERVED] = reservation.train(model.training)
    bank.call.clock = clock or bank.call.clock
    with ordinary_tensors():
        bank.call.set_neutral(torch.ones((), dtype=torch.float32, device=reservation.device))
    bank._outside = None
    refresh_(model)


def unreserve_(model: nn.Module) -> None:
    """Remove the slots of `model`. Their adapters run as adapter layers again, so a compiled model recompiles."""
    bank = bank_of(model)
    if bank is None or bank.reservation is None:
        return
    bank.find_layers(model)
    _fit_input_width_(model, bank.adapters.values(), bank, with_slots=False)
    del bank._modules[RESERVED]
    bank.call.set_neutral(None)
    bank.call.set_everywhere(None)
    bank._outside = None
    refresh_(model)
    _release_unused_(model, bank)


def refresh_(model: nn.Module) -> None:
    """Make exactly those adapters act that are active and not merged.

    Adapters with a seat act through their slots. All others act as adapter layers, which every host runs in the order
    in which the adapters were attached.
    """
    bank = bank_of(model)
    if bank is None:
        return
    reservation = bank.reservation
    acting = {name: adapter for name, adapter in bank.adapters.items() if adapter.active and name not in bank.merged}
    seated = {} if reservation is None else reservation.seated
    if reservation is not None:
        reservation.set_gates({name: adapter.gates for name, adapter in acting.items() if name in seated})
    assign_regions_(bank)
    outside = tuple(adapter for name, adapter in acting.items() if name not in seated)
    if bank._outside is not None and len(outside) == len(bank._outside):
        if all(adapter is before for adapter, before in zip(outside, bank._outside, strict=True)):
            return
    slots = {} if reservation is None else reservation.slots
    active: dict[str, tuple[AdapterLayer, ...]] = {path: slots.get(path, ()) for path in bank.hosts}
    for adapter in outside:
        for path, layer in adapter.layers.items():
            active[path] = (*active[path], layer)
    running: dict[int, tuple[AdapterLayer, ...]] = {}
    for path, layers in active.items():
        # A module that owns several adapted parameters is the host at several paths.
        key = id(bank.hosts[path])
        running[key] = (*running[key], *layers) if key in running else layers
    for path in active:
        host = bank.hosts[path]
        if host.__dict__[ACTIVE] != running[id(host)]:
            host.__dict__[ACTIVE] = running[id(host)]
    bank._outside = outside


def extend_(host: nn.Module, tokens: tuple[nn.Module, ...]) -> None:
    """Make the token embedding `host` look up the ids of learned tokens elsewhere.

    Args:
        tokens: modules that have `holds(ids)` and are called with ids and the embeddings so far. An empty tuple undoes
            an earlier call.

    Raises:
        AdapterError: the class of the layer cannot be changed.
    """
    if host.__dict__.get(TOKENS, ()) == tokens:
        return
    try:
        if tokens:
            carries = ACTIVE in host.__dict__
            carry_(host, Extended)
            if not carries:
                del host.__dict__[ACTIVE]
        else:
            unmix_(host)
            if ACTIVE in host.__dict__:
                carry_(host)
    except TypeError as error:
        raise AdapterError(f"a {type(host).__name__} cannot get further tokens ({error})") from error
    if tokens:
        host.__dict__[TOKENS] = tokens
    else:
        del host.__dict__[TOKENS]


def _adapt_(model: nn.Module, hosts: Mapping[str, nn.Module]) -> Bank:
    """Make `hosts` able to carry adapter layers, all of them or none, and return the bank of `model`."""
    bank = bank_of(model)
    new = {path: host for path, host in hosts.items() if bank is None or path not in bank.hosts}
    changed: list[nn.Module] = []
    for path, host in new.items():
        try:
            carry_(host)
        except TypeError as error:
            for earlier in changed:
                release_(earlier)
            raise AdapterError(f"{path}: its class cannot carry an adapter ({error})") from error
        changed.append(host)
    if bank is None:
        bank = Bank()
        bank.model = ref(model)
        bank.train(model.training)
        model._modules[BANK] = bank
        model.register_forward_pre_hook(check_call, with_kwargs=True)  # type: ignore[arg-type]
        model.register_forward_hook(bank.after_call, with_kwargs=True)
    if new:
        bank.hosts.update(new)
        bank.attentions.update(fusible_attentions(model, new))
        # All of these layers have been looked up just now.
        bank._watch = Watch(model, {**bank.embeddings, **bank.hosts})
        bank._gradient_flow = None
    return bank


def _clock_of(model: nn.Module, layers: Iterable[AdapterLayer]) -> Clock | None:
    """Return how a model is told the timestep, if one of the layers depends on it."""
    return Clock.of(model) if any(UNTIL in layer.tensors for layer in layers) else None


def _fit_input_width_(
    model: nn.Module, adapters: Collection[Adapter], bank: Bank | None, *, with_slots: bool = True
) -> None:
    """Give the layer that reads latents as many inputs as these adapters, and `with_slots` the slots, need."""
    slots = bank.reservation.slots if bank is not None and bank.reservation is not None and with_slots else {}
    fit_input_width_(model, [*(adapter.layers for adapter in adapters), slots], [] if bank is None else bank.undo)


def _hosts_of_parameters(bank: Bank) -> list[nn.Module]:
    """Return the modules that carry adapter layers of bare parameters, which may be the hosts of several."""
    return [
        layer.host
        for adapter in bank.adapters.values()
        for layer in adapter.layers.values()
        if layer.parameter != "weight"
    ]


def _release_unused_(model: nn.Module, bank: Bank) -> None:
    """Restore layers that carry nothing any more, and remove the bank and its hooks if it is empty."""
    unused = set(bank.hosts) if bank.reservation is None else bank.hosts.keys() - bank.reservation.slots.keys()
    for adapter in bank.adapters.values() if unused else ():
        unused.difference_update(adapter.layers)
    shared = {id(host) for host in _hosts_of_parameters(bank)} if unused else set[int]()
    for path in unused:
        host = bank.hosts.pop(path)
        if id(host) not in shared:
            release_(host)
        bank.attentions.pop(path, None)
        bank.lost.discard(path)
    if unused:
        bank._watch = None
    if not bank._modules:
        del model._modules[BANK]
        forget_text_(model)
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            own = [key for key, hook in hooks.items() if hook is check_call or getattr(hook, "__self__", None) is bank]
            for key in own:
                del hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                model._forward_hooks_with_kwargs.pop(key, None)
