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

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt import compose
from diffadapt.adapter import BANK, Adapter, AdapterLayer, CallState
from diffadapt.errors import AdapterError
from diffadapt.hooks import diffusers_scales_with_peft, is_bypassed
from diffadapt.locks import refuse_other_threads
from diffadapt.mixed import Mixin, mixed, own_class
from diffadapt.slots import Reservation
from diffadapt.undo import Undo
from diffadapt.widen import level_

_ACTIVE = "_diffadapt_active"
# With a dot, which no adapter's name has.
_RESERVED = "reserved.slots"
_TOKENS = "_diffadapt_tokens"
_INPUTS = ("sample", "hidden_states", "x", "input_ids", "inputs_embeds")
_SCALE_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Adapted(Mixin):
    """Mixed into the class of an adapted layer: the layer's own call, then its active adapter layers."""

    _diffadapt_active: tuple[AdapterLayer, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active = self._diffadapt_active
        if not active:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        return compose.run(active, self, super().__call__, args, kwargs)  # type: ignore[misc,arg-type]


class Extended(Adapted):
    """Mixed into the class of a token embedding that has vectors for more tokens than its weight has rows for.

    The weight stays as it is: these ids never get to it, nor to the adapter layers.
    """

    _diffadapt_active = ()
    _diffadapt_tokens: tuple[nn.Module, ...]

    def __call__(self, input: Tensor) -> Tensor:
        known = input
        for more in self._diffadapt_tokens:
            known = known.masked_fill(more.holds(input), 0)  # type: ignore[operator]
        output = super().__call__(known)
        for more in self._diffadapt_tokens:
            output = more(input, output)
        return output


class Bank(nn.Module):
    """A model's adapters by name, in the order they were attached; a child of the model that no state dict shows.

    Attributes:
        hosts: module path -> the layer of the model that carries adapter layers.
        attentions: module path of a host -> its parent, where diffusers can fuse that and then bypass the host.
        merged: names of the adapters that are merged into the weights.
        undo: for every base tensor that they changed, the way back.
        replacing: learned tokens for which the model's output is replaced, each with `replaced(ids, output)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = CallState()
        self.hosts: dict[str, nn.Module] = {}
        self.attentions: dict[str, nn.Module] = {}
        self.merged: tuple[str, ...] = ()
        self.undo: list[Undo] = []
        self.replacing: tuple[nn.Module, ...] = ()
        self._carriers: list[tuple[nn.Module, Any]] = []
        self._beside: tuple[Adapter, ...] | None = ()

    @property
    def reservation(self) -> Reservation | None:
        """The slots of this model, if any are reserved."""
        found = self._modules.get(_RESERVED)
        return found if isinstance(found, Reservation) else None

    @property
    def ways(self) -> dict[int, Undo]:
        """The ways back by `id` of the base tensor."""
        return {id(way.tensor): way for way in self.undo}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Adapters by name, in the order they were attached."""
        return {name: child for name, child in self._modules.items() if isinstance(child, Adapter)}

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Nothing: accelerate's per-layer offloading walks these and looks their weights up in the model's state dict.

        Adapters are not in there; they stay where they are, and an adapter layer follows its input.
        """
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """The adapters, for everything that moves, casts or switches a model as a whole."""
        return (child for child in self._modules.values() if child is not None)

    def forward(self, input: Any) -> Any:
        """The input as it is: a root that calls all its children in turn (`nn.Sequential`) calls the bank too."""
        return input

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing, when asked as part of a model: the model's state dict is the base model's."""
        if destination is not None:
            return destination
        return super().state_dict(*args, **kwargs)

    def before_call(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the model: pick up the scale that diffusers' pipelines pass with a call.

        Raises:
            AdapterError: a layer would not be called, because its projections were fused after loading; or another
                thread holds the model.
        """
        refuse_other_threads(model)
        for path, attention in self.attentions.items():
            fused = attention.fused_projections and is_bypassed(attention, path.rpartition(".")[2])
            if fused and self.hosts[path].__dict__[_ACTIVE]:
                raise AdapterError(
                    f"{path} carries an adapter, but its projections are fused, so it is never called; "
                    "call unfuse_qkv_projections(), or merge the adapter before fusing"
                )
        self._restore_checkpointing()
        value = self.call.outer
        for name in _SCALE_KWARGS:
            options = kwargs.get(name)
            if isinstance(options, dict) and options.get("scale") is not None:
                value = torch.as_tensor(options["scale"], dtype=torch.float32)
                if not diffusers_scales_with_peft():
                    kwargs[name] = {key: option for key, option in options.items() if key != "scale"}
        self.call.value = value
        self.call.batch = _batch_of(args, kwargs)
        if value is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._carry_through_checkpointing(model, value)
        return args, kwargs

    def after_call(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Forward hook of the model: the scale was for this call only. Learned tokens may have outputs of their own."""
        self._restore_checkpointing()
        self.call.value = self.call.outer
        self.call.batch = 0
        if not self.replacing:
            # A compiler that looks at the hook by itself need not look at the output then.
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        for tokens in self.replacing if isinstance(ids, Tensor) else ():
            output = tokens.replaced(ids, output)  # type: ignore[operator]
        return output

    def _carry_through_checkpointing(self, model: nn.Module, value: Tensor) -> None:
        """Make blocks that are recomputed during backward see the scale of the call they belong to.

        Backward runs after this call has ended, perhaps after another one with another scale, so the value has to
        travel with the checkpointed function and not in a place that is reset.
        """
        for module in model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None:
                self._carriers.append((module, checkpoint))
                module.__dict__["_gradient_checkpointing_func"] = _carrying(checkpoint, self.call, value)

    def _restore_checkpointing(self) -> None:
        # Also before a call: after an exception in forward the hook that follows it does not run.
        while self._carriers:
            module, checkpoint = self._carriers.pop()
            module.__dict__["_gradient_checkpointing_func"] = checkpoint


def bank_of(model: nn.Module) -> Bank | None:
    """The bank of `model`, or `None` if it carries no adapter."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, Bank) else None


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
    bank._modules[_RESERVED] = reservation.train(model.training)
    bank._beside = None
    refresh_(model)


def unreserve_(model: nn.Module) -> None:
    """Remove the slots; the adapters in them run as parameters of their own again, which a compiled model notices."""
    bank = bank_of(model)
    if bank is None or bank.reservation is None:
        return
    _level_(model, bank.adapters.values(), bank, reserved=False)
    del bank._modules[_RESERVED]
    bank._beside = None
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
    if bank._beside is not None and len(beside) == len(bank._beside):
        if all(adapter is before for adapter, before in zip(beside, bank._beside, strict=True)):
            return
    slots = {} if reservation is None else reservation.slots
    active: dict[str, tuple[AdapterLayer, ...]] = {path: slots.get(path, ()) for path in bank.hosts}
    for adapter in beside:
        for path, layer in adapter.layers.items():
            active[path] = (*active[path], layer)
    for path, layers in active.items():
        host = bank.hosts[path]
        if host.__dict__[_ACTIVE] != layers:
            host.__dict__[_ACTIVE] = layers
    bank._beside = beside


def _adapt_(model: nn.Module, hosts: Mapping[str, nn.Module]) -> Bank:
    """Prepare layers for carrying adapter layers: all of them, or none if one refuses."""
    classes: list[tuple[nn.Module, type[nn.Module]]] = []
    for path, host in hosts.items():
        if _ACTIVE not in host.__dict__:
            base = type(host)
            try:
                if not isinstance(host, Adapted):
                    host.__class__ = mixed(base, Adapted)
            except TypeError as error:
                for changed, before in classes:
                    changed.__class__ = before
                    changed.__dict__.pop(_ACTIVE, None)
                raise AdapterError(f"{path}: its class cannot carry an adapter ({error})") from error
            classes.append((host, base))
            host.__dict__[_ACTIVE] = ()
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
    level_(model, [*(adapter.layers for adapter in adapters), slots], [] if bank is None else bank.undo)


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
    if host.__dict__.get(_TOKENS, ()) == tokens:
        return
    base = own_class(host)
    mixin = Extended if tokens else Adapted if _ACTIVE in host.__dict__ else None
    try:
        host.__class__ = base if mixin is None else mixed(base, mixin)
    except TypeError as error:
        raise AdapterError(f"a {type(host).__name__} cannot get further tokens ({error})") from error
    if tokens:
        host.__dict__[_TOKENS] = tokens
    else:
        del host.__dict__[_TOKENS]


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


def _batch_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch that a model is called with; some models take it as a list."""
    named = (kwargs.get(name) for name in _INPUTS)
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
            return len(value)
    return 0


def _release_(host: nn.Module) -> None:
    host.__dict__.pop(_ACTIVE, None)
    if isinstance(host, Adapted) and not isinstance(host, Extended):
        host.__class__ = own_class(host)


def _carrying(checkpoint: Callable[..., Any], call: CallState, value: Tensor) -> Callable[..., Any]:
    def carry(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def scoped(*inner: Any, **options: Any) -> Any:
            before, call.value = call.value, value
            try:
                return function(*inner, **options)
            finally:
                call.value = before

        return checkpoint(scoped, *args, **kwargs)

    return carry
