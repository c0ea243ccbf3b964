"""The bank: the one child of a model that owns its adapters and slots, with the hooks that run before and after a call.

While a call runs with gradients, the bank also replaces the checkpointing functions of the model's blocks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.acting import Acting
from diffadapt.runtime.adapted_layers import ACTIVE, TOKENS
from diffadapt.runtime.adapter import Adapter, LayerTree
from diffadapt.runtime.adapter_layer import BANK, AdapterLayer
from diffadapt.runtime.call_arguments import batch_of, is_ragged
from diffadapt.runtime.call_state import SCALE_KWARGS, CallState, scale_of_call
from diffadapt.runtime.disk_offload import keep_in_memory_, note_groups_, why_not_writable
from diffadapt.runtime.foreign_hooks import is_bypassed, is_fusible, layer_devices, scales_with_peft
from diffadapt.runtime.gradient_flow import GradientFlow
from diffadapt.runtime.replaced_layers import (
    Lookup,
    Watch,
    find_again_,
    follow_convolutions_,
    module_at,
    refuse_problems,
    reseat_,
)
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.runtime.text_cache import AdapterState, forget_text_
from diffadapt.runtime.undo import Undo

RESERVED = "reserved.slots"
"""Name of the bank's child that holds the slots. It has a dot, which no child of an adapter has; see `child_name`."""


class Bank(nn.Module):
    """The adapters of one model by name, in the order in which they were attached, and its slots.

    The bank is a child of the model that the model's state dict does not contain.

    Attributes:
        call: the per-call state, which all adapter layers of the model share.
        hosts: module path -> layer of the model that carries adapter layers.
        embeddings: module path -> token embedding that looks up learned tokens; it need not be a host.
        attentions: module path of a host -> its parent, if diffusers can fuse the parent's projections and then no
            longer calls the host.
        merged: the names of the adapters that are merged into the weights.
        lost: module paths of layers that were replaced after an adapter was merged into their weights.
        undo: a way back for every base tensor that the merged adapters changed.
        replacing: learned tokens that replace parts of the model's output, each with `replaced(ids, output)`.
        model: the model that has this bank, weakly; `None` for a copy that was not called yet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.call = CallState()
        self.hosts: dict[str, nn.Module] = {}
        self.embeddings: dict[str, nn.Module] = {}
        self.attentions: dict[str, nn.Module] = {}
        self.merged: tuple[str, ...] = ()
        self.lost: set[str] = set()
        self.undo: list[Undo] = []
        # `id` of a base tensor in `undo` -> its autograd version after merging, to notice that it was written since.
        self.versions: dict[int, int] = {}
        self.replacing: tuple[nn.Module, ...] = ()
        self.model: ref[nn.Module] | None = None
        # `None` makes the next call of the model look for its layers.
        self._watch: Watch | None = None
        # What has to be asked of the model's layers when adapters are trained; `None` makes the next such call find it.
        self._gradient_flow: GradientFlow | None = None
        # The adapters of the last call, on models that keep the keys and values of their text.
        self._cached_with: AdapterState | None = None
        # The `device_map` of accelerate that adapters and slots were placed for.
        self._device_map: Any = None
        # Modules whose checkpointing function is replaced during this call, with their own function.
        self._checkpointed: list[tuple[nn.Module, Any]] = []
        # The masks, adapters and seats that layers last got their regions for; `None` without masks.
        self._assigned: tuple[object, ...] | None = None
        # The adapters outside the slots that the last `refresh_` made active; `None` makes the next one set all layers.
        self._outside: tuple[Adapter, ...] | None = ()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a plain attribute, also if an adapter has its name. Children are only set in `_modules`."""
        self.__dict__[name] = value

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled. A copy looks for its own layers."""
        return {
            **self.__dict__,
            "_watch": None,
            "_gradient_flow": None,
            "_cached_with": None,
            "model": None,
            "versions": {},
        }

    @property
    def reservation(self) -> Reservation | None:
        """The slots of this model, or `None` if none are reserved."""
        found = self._modules.get(RESERVED)
        return found if isinstance(found, Reservation) else None

    @property
    def ways(self) -> dict[int, Undo]:
        """`id` of a base tensor -> the way back to its original content."""
        return {id(way.tensor): way for way in self.undo}

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by name, in the order in which they were attached."""
        # A list, since another thread may be loading an adapter.
        children = ((name, child) for name, child in list(self._modules.items()) if isinstance(child, Adapter))
        return {_adapter_name(name) if "%" in name else name: child for name, child in children}

    def find_layers(self, model: nn.Module) -> dict[str, str]:
        """Move adapter layers to the layers that are at their paths now, if any were replaced.

        Returns:
            Path -> problem, for layers that were replaced by something that cannot carry their adapters.
        """
        keep_in_memory_(model, self.children())
        note_groups_(model, self.hosts)
        self._follow_devices(model)
        if self._watch is not None and self._watch.is_current():
            return {}
        watched = {**self.embeddings, **self.hosts}
        carried: dict[str, tuple[list[str], list[AdapterLayer]]] = {path: ([], []) for path in watched}
        for name, adapter in self.adapters.items():
            for path, layer in adapter.layers.items():
                carried[path][0].append(name)
                carried[path][1].append(layer)
        for path, slots in self.reservation.slots.items() if self.reservation is not None else ():
            carried[path][1].extend(slots)
        # An adapter has its learned tokens next to its layers.
        having = [name for name, own in self.adapters.items() if len(own._modules) > len(own.layers)]
        for path in self.embeddings:
            carried[path][0].extend(name for name in having if name not in carried[path][0])
        moved, problems = find_again_(model, watched, carried)
        for own in (self.hosts, self.embeddings):
            own.update((path, watched[path]) for path in own)
        if moved:
            self.attentions = dict(fusible_attentions(model, self.hosts))
            merged = {path for name in self.merged for path in self.adapters[name].layers}
            self.lost.update(path for path in moved if path in merged and not self._can_unmerge(self.hosts[path]))
            if self.reservation is not None:
                reseat_(self.reservation, moved, {name: adapter.layers for name, adapter in self.adapters.items()})
            self._follow_devices(model, always=True)
        follow_convolutions_(watched, carried)
        # With a problem, every call looks again, and is refused.
        self._watch = None if problems else Watch(model, watched)
        self._gradient_flow = None
        return problems

    def set_embeddings(self, embeddings: Mapping[str, nn.Module]) -> None:
        """Let learned tokens follow these token embeddings, by module path, when they are replaced."""
        if self.embeddings != embeddings:
            self.embeddings = dict(embeddings)
            self._watch = None

    def _follow_devices(self, model: nn.Module, *, always: bool = False) -> None:
        """Move adapters and slots to the devices of their layers, if accelerate has spread the model since."""
        device_map = model.__dict__.get("hf_device_map")
        if device_map is self._device_map and not always:
            return
        self._device_map = device_map
        devices = layer_devices(model, self.hosts)
        for tree in self.children() if devices else ():
            if isinstance(tree, LayerTree):
                tree.place_(devices)

    def refuse_lost_merges(self, model: nn.Module, paths: Iterable[str] = ()) -> None:
        """Raise `AdapterError` if a layer was replaced after an adapter was merged into its weight.

        Args:
            model: the model of this bank.
            paths: further layers that are going to be merged into, which must be there, too.
        """
        problems = self.find_layers(model)
        concerned = {*paths, *(path for name in self.merged for path in self.adapters[name].layers)}
        refuse_problems({path: problem for path, problem in problems.items() if path in concerned})
        reason = why_not_writable(model, {path: self.hosts[path] for path in concerned if path in self.hosts})
        if concerned and reason is not None:
            raise AdapterError(reason)
        if self.lost:
            first = min(self.lost)
            names = ", ".join(repr(name) for name in self.merged if first in self.adapters[name].layers)
            raise AdapterError(
                f"{first} was replaced after {names} was merged into its weight, whose original is gone; load the "
                "model again, or unmerge before the layers are replaced"
            )

    def refuse_replaced(self, model: nn.Module) -> None:
        """Find layers that were replaced. Raise `AdapterError` if an adapter that acts on one cannot act."""
        problems = self.find_layers(model)
        layers = {**self.embeddings, **self.hosts}
        acting = (path for path in problems if any(layers[path].__dict__.get(name) for name in (ACTIVE, TOKENS)))
        refuse_problems({path: problems[path] for path in acting})
        if self._watch is not None:
            self._watch.refuse_own_convolutions()

    @torch.compiler.assume_constant_result
    def refuse_replaced_traced(self) -> bool:
        """Do what `refuse_replaced` does, while a graph is traced, and leave nothing in the graph.

        The model is no argument, because older versions of torch take no module as an argument of a constant function.

        Returns:
            Whether the bank knows its model; a copy does from its first call outside a graph on.
        """
        model = None if self.model is None else self.model()
        if model is None:
            return False
        self.refuse_replaced(model)
        return True

    @torch.compiler.assume_constant_result
    def refuse_replaced_traced_in(self, model: nn.Module) -> None:
        """Do what `refuse_replaced_traced` does for a copy that does not know its model."""
        self.refuse_replaced(model)

    def follow_in_text_cache(self, model: nn.Module, kwargs: Mapping[str, Any]) -> None:
        """Make a model whose text is cached compute it again if its adapters have changed since the last call."""
        state = AdapterState(self.children(), self.merged, scale_of_call(kwargs))
        if state != self._cached_with:
            forget_text_(model)
            self._cached_with = state

    def refuse_wrong_gradients(self, model: nn.Module) -> None:
        """Raise `AdapterError` if this call would train adapters with wrong gradients, or without any.

        `add_adapter` has asked already, but layers may have been quantised or rewritten since.
        """
        if self._gradient_flow is None:
            self._gradient_flow = GradientFlow(model)
        if not self._gradient_flow.layers:
            return
        trained: dict[str, AdapterLayer] = {}
        for adapter in self.adapters.values():
            for path, layer in adapter.layers.items() if adapter.active else ():
                if any(tensor.requires_grad for tensor in layer.tensors.values()):
                    trained[path] = layer
        self._gradient_flow.refuse_wrong(trained)

    def _can_unmerge(self, host: nn.Module) -> bool:
        """Return whether there is a way back for a tensor of `host`."""
        return any(id(parameter) in self.ways for parameter in host._parameters.values())

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return nothing, to keep accelerate's per-layer offloading out of the bank.

        It walks the named children and looks their weights up in the model's state dict, which does not contain
        adapters. So adapters stay where they are, and an adapter layer follows its input.
        """
        return iter(())

    def children(self) -> Iterator[nn.Module]:
        """Return the adapters and slots, for everything that moves, casts or switches a model as a whole."""
        return (child for child in list(self._modules.values()) if child is not None)

    def forward(self, input: Any) -> Any:
        """Return the input. A root that calls all its children in turn (`nn.Sequential`) also calls the bank."""
        return input

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Return the state dict of the bank, or add nothing to `destination` when collecting that of a whole model."""
        if destination is not None:
            return destination
        return super().state_dict(*args, **kwargs)

    def before_call(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read the per-call scale and the batch size of a call, and return its arguments as the model gets them.

        diffusers' pipelines pass the scale as `scale` in one of three keyword arguments; without peft it is taken out
        of them, since diffusers would warn that it has no effect.

        Raises:
            AdapterError: a layer with an adapter would not be called because its projections were fused after loading,
                or rows of the batch cannot be assigned to the mixes of `per_sample`.
        """
        for path, attention in self.attentions.items():
            fused = attention.fused_projections and is_bypassed(attention, path.rpartition(".")[2])
            if fused and self.hosts[path].__dict__[ACTIVE]:
                raise AdapterError(
                    f"{path} carries an adapter, but its projections are fused, so it is never called; "
                    "call unfuse_qkv_projections(), or merge the adapter before fusing"
                )
        self._restore_checkpointing()
        scale = scale_of_call(kwargs)
        value = self.call.outer if scale is None else self.call.scale(scale)
        for name in SCALE_KWARGS if scale is not None and not scales_with_peft(model) else ():
            options = kwargs.get(name)
            if isinstance(options, dict):
                # `None`, as without a scale: a compiled graph depends on whether there is a dict.
                kwargs[name] = {key: option for key, option in options.items() if key != "scale"} or None
        self.call.value = value
        self.call.batch = batch_of(args, kwargs)
        self.call.is_ragged = any(map(is_ragged, (*args, *kwargs.values())))
        self.call.row_samples = None
        self.call.timestep = None if self.call.clock is None else self.call.clock.read(args, kwargs)
        reservation = self.reservation
        if reservation is not None and reservation.samples and self.call.batch:
            self.call.assign_rows(reservation.device)
        if not torch.compiler.is_compiling() or self.call.row_samples is not None:
            # A graph that contains the call depends on what is checked here only if it assigns the rows itself.
            self.call.refuse_unknown_rows()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._bind_checkpointing(model)
        return args, kwargs

    def after_call(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """Reset the per-call state, and put the outputs of learned tokens into `output`. This is a forward hook."""
        self._restore_checkpointing()
        self.call.value = self.call.outer
        self.call.batch = 0
        self.call.row_samples = self.call.timestep = None
        if not self.replacing:
            # The output is not touched, so that a compiler which traces this hook separately need not trace it.
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        for tokens in self.replacing if isinstance(ids, Tensor) else ():
            output = tokens.replaced(ids, output)  # type: ignore[operator]
        return output

    def _bind_checkpointing(self, model: nn.Module) -> None:
        """Make blocks that are recomputed during backward see the scale and timestep of the call that they belong to.

        Backward runs after this call has ended, and perhaps after another call with another scale. So the scale must
        travel with the checkpointed function, not in state that is reset. Strengths do not, so they must not change.
        """
        acting = self._acting()
        if not acting:
            return
        for module in model.modules():
            checkpoint = module.__dict__.get("_gradient_checkpointing_func")
            if checkpoint is not None:
                self._checkpointed.append((module, checkpoint))
                module.__dict__["_gradient_checkpointing_func"] = _with_state(
                    checkpoint, self.call, lambda: acting.refuse_changed(self._acting())
                )

    def _acting(self) -> Acting:
        return Acting((adapter for adapter in self.adapters.values() if adapter.active), self.call.regions)

    def _restore_checkpointing(self) -> None:
        # Called before a call too, since the forward hook does not run after an exception in forward.
        while self._checkpointed:
            module, checkpoint = self._checkpointed.pop()
            module.__dict__["_gradient_checkpointing_func"] = checkpoint


def child_name(adapter: str) -> str:
    """Return the name of the bank's child for an adapter: its own, without dots, which separate names of modules."""
    return adapter.replace("%", "%25").replace(".", "%2E")


def _adapter_name(child: str) -> str:
    """Return the name of the adapter with this `child_name`."""
    return child.replace("%2E", ".").replace("%25", "%")


def bank_of(model: nn.Module) -> Bank | None:
    """Return the bank of `model`, or `None` if it has neither adapters nor slots."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, Bank) else None


def fusible_attentions(model: nn.Module, paths: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield each path with its parent module, if diffusers can fuse the projections of that parent."""
    lookup = Lookup(model)
    for path in paths:
        parent_path = path.rpartition(".")[0]
        parent = lookup.parent(parent_path) or module_at(model, parent_path)
        if parent is not None and is_fusible(parent):
            yield path, parent


def _with_state(checkpoint: Callable[..., Any], call: CallState, check: Callable[[], None]) -> Callable[..., Any]:
    """Return `checkpoint` such that the function it is given always runs with what `call` has now, after `check`."""
    kept = call.keep()

    def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def in_call(*inner: Any, **options: Any) -> Any:
            check()
            with kept():
                return function(*inner, **options)

        return checkpoint(in_call, *args, **kwargs)

    return wrapped
