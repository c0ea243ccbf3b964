"""The registry of adapter types. Adding a type is one file beside this one and one line here.

The order is the order of detection; the tests iterate over `TYPES`, so a new type is covered at once.
"""

import copyreg

from diffadapt.errors import AdapterError
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.boft import BOFT
from diffadapt.types.config import AdapterConfig
from diffadapt.types.dora import DORA
from diffadapt.types.full import FULL
from diffadapt.types.glora import GLORA
from diffadapt.types.ia3 import IA3
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from diffadapt.types.oft import OFT

TYPES: tuple[AdapterType, ...] = (*DORA, LORA, LOHA, LOKR, OFT, BOFT, *IA3, GLORA, FULL)


def identify(tensors: Tensors) -> AdapterType | None:
    """The type that these tensors are of, or `None`."""
    for adapter_type in TYPES:
        if not adapter_type.identified_by.isdisjoint(tensors) and adapter_type.claims(tensors):
            return adapter_type
    return None


def named(name: str) -> AdapterType:
    """The type of this name. Raises `KeyError` for an unknown one."""
    return {adapter_type.name: adapter_type for adapter_type in TYPES}[name]


# A type is made of functions, some without a name that pickle could find; the type itself has one.
copyreg.pickle(AdapterType, lambda adapter_type: (named, (adapter_type.name,)))


def for_config(config: AdapterConfig) -> AdapterType:
    """The type that these settings are of.

    Raises:
        AdapterError: of none.
    """
    for adapter_type in TYPES:
        if adapter_type.config is type(config) and adapter_type.selects(config):
            return adapter_type
    raise AdapterError(f"{type(config).__name__} belongs to no adapter type")
