"""The forward pre-hook of every model with adapters: before each call, and while a graph that contains it is traced."""

from typing import Any
from weakref import ref

import torch
from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.runtime.bank import bank_of
from diffadapt.runtime.locks import refuse_other_threads
from diffadapt.runtime.text_cache import caches_text


@torch.compiler.disable
def check_call(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Let adapters follow layers that were replaced before a call, and read the call. A forward pre-hook of the model.

    A compiled model runs its hooks before its graph, and would freeze the answer if it compiled this one. Where the
    call is itself part of a graph, `_check_traced_call` stands in.

    Raises:
        AdapterError: another thread holds the model, an adapter cannot follow its layer, or adapters would be trained
            with wrong gradients.
    """
    bank = bank_of(model)
    if bank is None:
        return None
    refuse_other_threads(model)
    if bank.model is None:
        bank.model = ref(model)
    bank.refuse_replaced(model)
    if caches_text(model):
        bank.follow_in_text_cache(model, kwargs)
    if torch.is_grad_enabled():
        bank.refuse_wrong_gradients(model)
    arguments = bank.before_call(model, args, kwargs)
    if bank.call.regions is not None:
        bank.call.regions.begin(model, *arguments, (bank.call.batch, bank.call.images), bank.call.spread_masks)
    return arguments


@torch.compiler.substitute_in_graph(check_call, skip_signature_check=True)  # type: ignore[arg-type]
def _check_traced_call(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Do what `check_call` does while a graph is traced that contains the call."""
    bank = bank_of(model)
    if bank is None:
        return None
    if not bank.refuse_replaced_traced():
        bank.refuse_replaced_traced_in(model)
    if bank.call.regions is not None:
        raise AdapterError(
            f"regions: a {type(model).__name__} is called inside a compiled function, which does not know the picture "
            "before the call; compile the model itself"
        )
    return bank.before_call(model, args, kwargs)
