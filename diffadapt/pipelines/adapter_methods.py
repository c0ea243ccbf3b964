"""Stand-ins for the adapter methods that diffusers and transformers give to classes of theirs.

Those libraries know only the adapters that peft put into the models. On an object that carries adapters of this
library, a stand-in also serves those where a method means the same, and says what to call where it does not. A name
that is not one of ours is left to them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from diffadapt.errors import AdapterError
from diffadapt.management.manager import Adapters
from diffadapt.runtime.bank import bank_of
from diffadapt.strengths.by_prefix import Strength

_DISABLED: WeakKeyDictionary[Any, dict[str, Strength]] = WeakKeyDictionary()
"""Pipeline or model -> the adapters that were disabled there, to be enabled again."""


class AdapterMethods(ABC):
    """Replacements for the adapter methods of one pipeline or model.

    Attributes:
        owner: the pipeline or model.
        adapters: returns the adapters of this library.
    """

    served: ClassVar[tuple[str, ...]]
    """The names of the methods."""

    call: ClassVar[str]
    """How code spells the adapters of an owner, for messages."""

    def __init__(self, owner: Any, adapters: Callable[[], Adapters]) -> None:
        self.owner = owner
        self.adapters = adapters

    @staticmethod
    @abstractmethod
    def models_of(owner: Any) -> list[nn.Module]:
        """Return the models of a pipeline, or the one model."""

    @classmethod
    def serve(cls, base: type, adapters_of: Callable[[Any], Adapters]) -> None:
        """Let these methods of a class also serve the adapters of this library.

        Args:
            base: a class that comes before those that have the methods, in all classes derived from it.
            adapters_of: returns the adapters of a pipeline or model.
        """
        for name in cls.served:
            if name not in vars(base):
                setattr(base, name, _Served(cls, base, name, adapters_of))

    def theirs(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the original method if peft put adapters into a model, else return `None`."""
        if not any(_has_peft(model) for model in self.models_of(self.owner)):
            return None
        return getattr(type(self.owner), name)(self.owner, *args, **kwargs)

    def _set(self, adapter_names: str | Sequence[str], weights: Any) -> None:
        """Make exactly these adapters active."""
        names = names_in(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise AdapterError(f"set_adapters: {len(given)} weights for {len(names)} adapters")
        ours: dict[str, Strength] = {}
        others: dict[str, Any] = {}
        for name, weight in zip(names, given, strict=True):
            if self._is_only_theirs(name):
                others[name] = weight
            else:
                ours[name] = self._strength(name, weight)
        self.activate(ours)
        _DISABLED.pop(self.owner, None)
        if others:
            self.theirs("set_adapters", list(others), list(others.values()))

    def activate(self, strengths: Mapping[str, Strength]) -> None:
        """Make exactly these adapters of this library active."""
        self.adapters().activate(strengths)

    def disable_lora(self) -> None:
        """Switch all adapters off, until `enable_lora`."""
        self._disable()
        self.theirs("disable_lora")

    def enable_lora(self) -> None:
        """Switch those on again that `disable_lora` switched off."""
        self._enable()
        self.theirs("enable_lora")

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters."""
        others = self._remove(names_in(adapter_names))
        if others:
            self.theirs("delete_adapters", others)

    def _is_only_theirs(self, name: str) -> bool:
        """Return whether peft put an adapter of this name into a model, and this library did not."""
        configs = [getattr(model, "peft_config", None) or {} for model in self.models_of(self.owner)]
        return name not in self.adapters() and any(name in config for config in configs)

    def _disable(self) -> None:
        adapters = self.adapters()
        active = adapters.active
        adapters.activate({})
        if active:
            _DISABLED[self.owner] = dict(active)

    def _enable(self) -> None:
        adapters = self.adapters()
        disabled = _DISABLED.pop(self.owner, {})
        waiting = {name: strength for name, strength in disabled.items() if name in adapters}
        if waiting:
            adapters.activate({**adapters.active, **waiting})

    def _remove(self, names: Sequence[str]) -> list[str]:
        """Remove the adapters of this library among `names`, and return the others."""
        adapters = self.adapters()
        others = [name for name in names if self._is_only_theirs(name)]
        ours = [name for name in names if name not in others]
        if ours:
            adapters.remove(ours)
        return others

    def _fuse(
        self, lora_scale: float, adapter_names: Sequence[str] | None, components: Sequence[str] | None = None
    ) -> list[str] | None:
        """Merge the adapters of this library among `adapter_names`, and return the others; `None` means all."""
        adapters = self.adapters()
        others = None if adapter_names is None else [name for name in adapter_names if self._is_only_theirs(name)]
        chosen = adapters.active if adapter_names is None else [n for n in adapter_names if n not in (others or ())]
        names = [name for name in chosen if name not in adapters.merged]
        unfused = {
            component
            for name in names
            for component in adapters[name].components
            if components is not None and component not in components
        }
        if unfused or (names and lora_scale != 1.0):
            raise AdapterError(
                f"fuse_lora: {', '.join(names)} can be merged at its own strength into all of its components only; "
                f"call {self.call}.activate(...) with the strengths you want, then {self.call}.merge()"
            )
        if names:
            adapters.merge(*names)
        return others

    def _strength(self, name: str, weight: Any) -> Strength:
        """Return the strength that a weight of `set_adapters` means.

        Raises:
            AdapterError: the weight names blocks in diffusers' own way.
        """
        if isinstance(weight, Mapping) and any(isinstance(part, Mapping) for part in weight.values()):
            raise AdapterError(
                f"set_adapters: weights by block are not taken for {name!r}; pass prefixes of module paths, as in "
                f'{self.call}.activate({{{name!r}: {{"unet.up_blocks.1": 0.5}}}})'
            )
        return 1.0 if weight is None else cast(Strength, weight)


class _Served:
    """The attribute `name` of a class: the original method, or ours if a model of the object has adapters."""

    def __init__(
        self, methods: type[AdapterMethods], base: type, name: str, adapters_of: Callable[[Any], Adapters]
    ) -> None:
        self.methods = methods
        self.base = base
        self.name = name
        self.adapters_of = adapters_of

    def __get__(self, owner: Any, cls: type) -> Any:
        theirs = getattr(super(self.base, cls if owner is None else owner), self.name)
        if owner is None or all(bank_of(model) is None for model in self.methods.models_of(owner)):
            return theirs
        return _Method(self.methods(owner, partial(self.adapters_of, owner)), self.name, theirs)


class _Method:
    """A stand-in for one method.

    Attributes:
        methods: the replacements, of which this is one.
        name: the name of the method.
        __wrapped__: the original method, whose parameters `inspect` shows.
    """

    def __init__(self, methods: AdapterMethods, name: str, original: Callable[..., Any]) -> None:
        self.methods = methods
        self.name = name
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.methods, self.name)(*args, **kwargs)


def _has_peft(model: nn.Module) -> bool:
    # A load that failed leaves layers of peft without a config.
    return bool(getattr(model, "peft_config", None)) or any(hasattr(module, "base_layer") for module in model.modules())


def names_in(names: str | Sequence[str]) -> list[str]:
    """Return one name, or several, as a list."""
    return [names] if isinstance(names, str) else list(names)
