"""The registry of adapter types. Adding a type is one file beside this one and one line here.

The order is the order of detection; the tests iterate over `TYPES`, so a new type is covered at once.
"""

from collections.abc import Iterable

from diffadapt.kind import AdapterType
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA

TYPES: tuple[AdapterType, ...] = (LORA, LOHA, LOKR)


def identify(names: Iterable[str]) -> AdapterType | None:
    """The type that owns these tensor names, or `None`."""
    present = set(names)
    for kind in TYPES:
        if present & kind.identified_by:
            return kind
    return None


def named(name: str) -> AdapterType:
    """The type of this name. Raises `KeyError` for an unknown one."""
    return {kind.name: kind for kind in TYPES}[name]
