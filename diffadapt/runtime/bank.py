"""The bank: the one child of a model that owns its adapters, and what happens before and after a call of the model."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.adapted_layers import ACTIVE
from diffadapt.runtime.adapter import Adapter
from diffadapt.runtime.adapter_layer import BANK
from diffadapt.runtime.call_state import CallState
from diffadapt.runtime.foreign_hooks import diffusers_scales_with_peft, is_bypassed
from diffadapt.runtime.locks import refuse_other_threads
from diffadapt.runtime.slots.reservation import Reservation
from diffadapt.runtime.undo import Undo

# With a dot, which no adapter's name has.
RESERVED = "reserved.slots"
_INPUTS = ("sample", "hidden_states", "x", "input_ids", "inputs_embeds")
_SCALE_KWARGS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


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
        self._outside: tuple[Adapter, ...] | None = ()

    @property
    def reservation(self) -> Reservation | None:
        """The slots of this model, if any are reserved."""
        found = self._modules.get(RESERVED)
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
            if fused and self.hosts[path].__dict__[ACTIVE]:
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


def _batch_of(args: Any, kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch that a model is called with; some models take it as a list."""
    named = (kwargs.get(name) for name in _INPUTS)
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, list) or (isinstance(value, Tensor) and value.ndim):
            return len(value)
    return 0


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
