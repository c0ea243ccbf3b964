"""Foreign objects with something mixed into their class: they keep their identity, and pickle knows their own class."""

import copyreg
from functools import cache
from typing import Any


class Mixin:
    """What can be mixed into the class of a foreign object."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and the dynamic class has none: name the object's own class instead.
        function, args, *rest = super().__reduce_ex__(protocol)  # type: ignore[misc]
        cls: Any = type(self)
        if function is copyreg.__newobj__ and args[0] is cls:  # type: ignore[attr-defined]
            return _new, (cls._diffadapt_base, cls._diffadapt_mixin, *args[1:]), *rest
        return function, args, *rest


@cache
def mixed(base: type[Any], mixin: type[Mixin]) -> type[Any]:
    """The class `(mixin, base)`, under the name of `base`."""
    names = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "_diffadapt_base": base,
        "_diffadapt_mixin": mixin,
    }
    return type(base.__name__, (mixin, base), names)


def own_class(instance: Any) -> type[Any]:
    """The class of an object without what is mixed into it."""
    return getattr(type(instance), "_diffadapt_base", type(instance))


def _new(base: type[Any], mixin: type[Mixin], *args: Any) -> Any:
    cls = mixed(base, mixin)
    return cls.__new__(cls, *args)
