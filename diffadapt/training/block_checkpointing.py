"""Gradient checkpointing from outside: whole blocks are recomputed in the backward pass, in any model.

The models' own checkpointing passes some arguments on wrongly: Chroma's loses its mask, HunyuanImage's raises. The
blocks are those that `_no_split_modules` names, or else `_repeated_blocks`, the outermost ones.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffadapt.errors import UsageError
from diffadapt.runtime.bank import bank_of


def checkpoint_blocks(model: nn.Module) -> int:
    """Recompute the blocks of a model in the backward pass; return how many there are.

    Raises:
        UsageError: the model does not name its blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise UsageError(f"--gradient_checkpointing: {type(model).__name__} does not name its blocks; leave it out")
    for block in blocks:
        _wrap(block, model)
    return len(blocks)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, the outermost ones of the classes that it names."""
    names = getattr(model, "_no_split_modules", None) or getattr(model, "_repeated_blocks", None) or ()
    return _outermost(model, set(names))


def _outermost(model: nn.Module, names: set[str]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in model.children():
        if any(kind.__name__ in names for kind in type(child).__mro__):
            found.append(child)
        else:
            found += _outermost(child, names)
    return found


def _wrap(block: nn.Module, model: nn.Module) -> None:
    forward = block.forward

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        # The backward pass runs after the call of the model, whose timestep adapters may depend on.
        bank = bank_of(model)
        return nullcontext(), nullcontext() if bank is None else bank.call.keep()()

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)

    block.forward = checkpointed  # type: ignore[method-assign]
