"""Mixing behaviour into the class of an existing object, which keeps its identity and pickles under its own class."""

import copyreg
from functools import cache
from typing import Any


class Mixin:
    """A base for classes that are mixed into the class of an existing object; see `mix_`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickle needs to rebuild the object, with its own class in place of the mixed one."""
        # Pickle finds classes by name, and the mixed class is not found under any.
        function, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        cls: Any = type(self)
        if function is copyreg.__newobj__ and args[0] is cls and is_mixed(self):  # type: ignore[attr-defined]
            return _new, (cls._diffadapt_base, cls._diffadapt_mixin, *args[1:]), *rest
        return function, args, *rest


def mix_(instance: Any, mixin: type[Mixin]) -> None:
    """Mix `mixin` into the class of an object, in place of what was mixed into it before.

    Raises:
        TypeError: the class of the object cannot be changed.
    """
    base = own_class(instance)
    if isinstance(instance, mixin) and base is type(instance):
        # Someone derived a class from the mixed one and gave it to the object.
        return
    try:
        instance.__class__ = _mixed(base, mixin)
    except TypeError:
        instance.__class__ = _mixed_under(base, mixin)


def unmix_(instance: Any) -> None:
    """Undo `mix_`. A class that someone else gave to the object since is left alone."""
    if is_mixed(instance):
        instance.__class__ = own_class(instance)


def own_class(instance: Any) -> type[Any]:
    """Return the class of an object without what `mix_` mixed into it.

    If someone else has changed the class since, it is theirs and returned as it is, even if it derives from a mixed
    class.
    """
    return vars(type(instance)).get("_diffadapt_base", type(instance))


def is_mixed(instance: Any) -> bool:
    """Return whether the class of an object is one that `mix_` gave it, and not one derived from it."""
    return "_diffadapt_base" in vars(type(instance))


@cache
def _mixed(base: type[Any], mixin: type[Mixin]) -> type[Any]:
    """Return the class `(mixin, base)` under the name of `base`; always the same class for the same arguments."""
    return type(base.__name__, (mixin, base), _names(base, mixin))


@cache
def _mixed_under(base: type[Any], mixin: type[Mixin]) -> type[Any]:
    """Return the same class as `_mixed`, with `base` as its first base.

    CPython takes the memory layout of a class from its first base. It assigns a class to an object only if both layouts
    have the same root, which a class derived from `ABC` or `Generic` does not share with a mixin. The method resolution
    order is that of `(mixin, base)` nevertheless.
    """

    def mro(cls: type[Any]) -> list[type[Any]]:
        own = [each for each in mixin.__mro__ if each not in base.__mro__]
        return [cls, *own, *base.__mro__]

    metaclass: Any = type(type(base).__name__, (type(base),), {"mro": mro})
    return metaclass(base.__name__, (base, mixin), _names(base, mixin))


def _names(base: type[Any], mixin: type[Mixin]) -> dict[str, Any]:
    return {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_diffadapt_base": base,
        "_diffadapt_mixin": mixin,
    }


def _new(base: type[Any], mixin: type[Mixin], *args: Any) -> Any:
    instance = base.__new__(base, *args)
    mix_(instance, mixin)
    return instance
