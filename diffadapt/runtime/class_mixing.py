"""Mixing behaviour into the class of an existing object, which keeps its identity and pickles under its own class."""

import copyreg
from functools import cache
from typing import Any


class Mixin:
    """A base for classes that are mixed into the class of an existing object; see `mixed`."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return what pickle needs to rebuild the object, with its own class in place of the mixed one."""
        # Pickle finds classes by name, and the mixed class is not found under any.
        function, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        cls: Any = type(self)
        if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
            return _new, (cls._diffadapt_base, cls._diffadapt_mixin, *args[1:]), *rest
        return function, args, *rest


@cache
def mixed(base: type[Any], mixin: type[Mixin]) -> type[Any]:
    """Return the class `(mixin, base)` under the name of `base`; always the same class for the same arguments."""
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_diffadapt_base": base,
        "_diffadapt_mixin": mixin,
    }
    return type(base.__name__, (mixin, base), names)


def own_class(instance: Any) -> type[Any]:
    """Return the class of an object without anything that was mixed into it."""
    return getattr(type(instance), "_diffadapt_base", type(instance))


def _new(base: type[Any], mixin: type[Mixin], *args: Any) -> Any:
    cls = mixed(base, mixin)
    return cls.__new__(cls, *args)
