"""diffusers' own methods for adapters, such as `set_adapters` and `unload_lora_weights`, on a pipeline with adapters.

diffusers knows only the adapters that peft put into the models. On a pipeline whose models carry adapters of this
library, its methods also serve those where they mean the same, and say what to call where they do not. A name that is
not one of ours is left to diffusers.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.management.manager import Adapters
from diffadapt.pipelines.base_classes import PIPELINE_CLASSES
from diffadapt.pipelines.components import components_of
from diffadapt.runtime.bank import bank_of
from diffadapt.strengths.by_prefix import Strength

_DISABLED: WeakKeyDictionary[Any, dict[str, Strength]] = WeakKeyDictionary()
"""Pipeline -> the adapters that `disable_lora` switched off, for `enable_lora`."""


def serve_diffusers_methods(adapters_of: Callable[[Any], Adapters]) -> None:
    """Make diffusers' adapter methods serve the adapters of this library, in all pipelines that are imported.

    A pipeline may share models with one that carries adapters, so this is done for the classes.

    Args:
        adapters_of: returns the adapters of a pipeline.
    """
    # In the classes derived from these, they come before those that have the methods of diffusers.
    for module, name in PIPELINE_CLASSES.items():
        base = getattr(sys.modules.get(module), name, None)
        if base is None:
            # Not imported yet.
            continue
        for method in _METHODS:
            if method not in vars(base):
                setattr(base, method, _Served(base, method, adapters_of))


class _Served:
    """The attribute `name` of pipelines: diffusers' own method, or ours if a model of the pipeline has adapters."""

    def __init__(self, base: type, name: str, adapters_of: Callable[[Any], Adapters]) -> None:
        self.base = base
        self.name = name
        self.adapters_of = adapters_of

    def __get__(self, pipe: Any, owner: type) -> Any:
        theirs = getattr(super(self.base, owner if pipe is None else pipe), self.name)
        if pipe is None or all(bank_of(model) is None for model in components_of(pipe).values()):
            return theirs
        return _Method(DiffusersMethods(pipe, partial(self.adapters_of, pipe)), self.name, theirs)


class DiffusersMethods:
    """Replacements for the adapter methods of one pipeline.

    Attributes:
        adapters: returns the adapters of this library.
    """

    def __init__(self, pipe: Any, adapters: Callable[[], Adapters]) -> None:
        self.pipe = pipe
        self.adapters = adapters

    def theirs(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the method of diffusers if peft put adapters into a model of the pipeline, else return `None`."""
        if not any(getattr(model, "peft_config", None) for model in self._models()):
            return None
        return getattr(type(self.pipe), name)(self.pipe, *args, **kwargs)

    def get_active_adapters(self) -> list[str]:
        return [*(self.theirs("get_active_adapters") or ()), *self.adapters().active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        found = {name: list(names) for name, names in (self.theirs("get_list_adapters") or {}).items()}
        adapters = self.adapters()
        for name in adapters:
            for component in adapters[name].components:
                found.setdefault(component, []).append(name)
        return found

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        names = _names(adapter_names)
        weights = (
            list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        )
        if len(weights) != len(names):
            raise AdapterError(f"set_adapters: {len(weights)} weights for {len(names)} adapters")
        adapters = self.adapters()
        ours: dict[str, Strength] = {}
        others: dict[str, Any] = {}
        for name, weight in zip(names, weights, strict=True):
            if name in adapters or not self._is_theirs(name):
                ours[name] = _strength(name, weight)
            else:
                others[name] = weight
        adapters.activate(ours)
        _DISABLED.pop(self.pipe, None)
        if others:
            self.theirs("set_adapters", list(others), list(others.values()))

    def disable_lora(self) -> None:
        adapters = self.adapters()
        active = adapters.active
        adapters.activate({})
        if active:
            _DISABLED[self.pipe] = dict(active)
        self.theirs("disable_lora")

    def enable_lora(self) -> None:
        adapters = self.adapters()
        disabled = _DISABLED.pop(self.pipe, {})
        waiting = {name: strength for name, strength in disabled.items() if name in adapters}
        if waiting:
            adapters.activate({**adapters.active, **waiting})
        self.theirs("enable_lora")

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        adapters, names = self.adapters(), _names(adapter_names)
        others = [name for name in names if name not in adapters and self._is_theirs(name)]
        adapters.remove([name for name in names if name not in others])
        if others:
            self.theirs("delete_adapters", others)

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        self.adapters().clear()
        self.theirs("unload_lora_weights", *args, **kwargs)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        adapters = self.adapters()
        names = list(adapters.active) if adapter_names is None else [name for name in adapter_names if name in adapters]
        names = [name for name in names if name not in adapters.merged]
        others = None if adapter_names is None else [name for name in adapter_names if name not in adapters]
        unfused = {
            component
            for name in names
            for component in adapters[name].components
            if components is not None and component not in components
        }
        if unfused or lora_scale != 1.0:
            raise AdapterError(
                f"fuse_lora: {', '.join(names)} can be merged at its own strength into all of its components only; "
                "call pipe.adapters.activate(...) with the strengths you want, then pipe.adapters.merge()"
            )
        if names:
            adapters.merge(*names)
        if others is None or others:
            options = {} if components is None else {"components": list(components)}
            self.theirs("fuse_lora", **options, safe_fusing=safe_fusing, adapter_names=others, **kwargs)

    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        self.adapters().unmerge()
        self.theirs("unfuse_lora", *args, **kwargs)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: Any) -> None:
        ours = [name for name in _names(adapter_names) if name in self.adapters()]
        if ours:
            raise AdapterError(
                f"set_lora_device: {', '.join(ours)} runs where its model does; pipe.adapters.remove() frees its "
                "memory, and an AdapterPool keeps adapters in CPU memory"
            )
        self.theirs("set_lora_device", adapter_names, device)

    def _models(self) -> list[nn.Module]:
        return list(components_of(self.pipe).values())

    def _is_theirs(self, name: str) -> bool:
        return any(name in (getattr(model, "peft_config", None) or {}) for model in self._models())


class _Method:
    """A stand-in for one method of a pipeline.

    Attributes:
        methods: the replacements, of which this is one.
        name: the name of the method.
        __wrapped__: the original method, whose parameters `inspect` shows.
    """

    def __init__(self, methods: DiffusersMethods, name: str, original: Callable[..., Any]) -> None:
        self.methods = methods
        self.name = name
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.methods, self.name)(*args, **kwargs)


_METHODS = (
    "get_active_adapters",
    "get_list_adapters",
    "set_adapters",
    "disable_lora",
    "enable_lora",
    "delete_adapters",
    "unload_lora_weights",
    "fuse_lora",
    "unfuse_lora",
    "set_lora_device",
)


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _strength(name: str, weight: Any) -> Strength:
    """Return the strength that a weight of `set_adapters` means.

    Raises:
        AdapterError: the weight names blocks in diffusers' own way.
    """
    if isinstance(weight, Mapping) and any(isinstance(part, Mapping) for part in weight.values()):
        raise AdapterError(
            f"set_adapters: weights by block are not taken for {name!r}; pass prefixes of module paths, as in "
            f'pipe.adapters.activate({{{name!r}: {{"unet.up_blocks.1": 0.5}}}})'
        )
    return 1.0 if weight is None else cast(Strength, weight)
