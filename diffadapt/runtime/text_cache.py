"""diffusers' cache of text keys and values (`TextKVCacheConfig`), which must not outlive a change of adapters.

It computes the keys and values of a prompt once in a run, with the adapters of that moment, and is meant to be exact.
The other caches of diffusers are approximations that reuse results of earlier steps, and are left alone.
"""

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, nn

from diffadapt.runtime.adapter import Adapter, LayerTree

_ROOT_HOOK, _BLOCK_HOOK = "text_kv_cache_transformer", "text_kv_cache_block"


class AdapterState:
    """What adapters a model had in a call, as far as the model's output depends on it.

    A tensor counts as unchanged if it is the same object in the same version.
    """

    def __init__(self, trees: Iterable[nn.Module], merged: Iterable[str], scale: Any) -> None:
        """Remember the state.

        Args:
            trees: the adapters and the slots.
            merged: the names of the adapters that are merged.
            scale: the scale that the call was given.
        """
        own = [tree for tree in trees if isinstance(tree, LayerTree)]
        # They are kept, so that no other object gets their `id`.
        self._objects: list[Any] = [*own, *(tree._gates for tree in own)]
        self._state: tuple[Hashable, ...] = (
            *map(id, self._objects),
            *(tree._gates._version for tree in own),
            *(tree.active for tree in own if isinstance(tree, Adapter)),
            *merged,
            float(scale) if isinstance(scale, (int, float, Tensor)) else None,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterState) and self._state == other._state

    __hash__ = None  # type: ignore[assignment]


def caches_text(model: nn.Module) -> bool:
    """Return whether the text cache is enabled on a model."""
    registry = model.__dict__.get("_diffusers_hook")
    return registry is not None and _ROOT_HOOK in registry.hooks


def forget_text_(model: nn.Module) -> None:
    """Make the next call of a model compute the keys and values of its text again."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        hook: Any = None if registry is None else registry.hooks.get(_BLOCK_HOOK)
        # Not `reset`, which would also end the context of the run.
        for state in hook.block_state_manager._state_cache.values() if hook is not None else ():
            state.reset()
