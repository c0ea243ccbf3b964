"""The registry of adapter types. To add a type, add a module to this package and an entry to `TYPES`.

The tests iterate over `TYPES`, so they cover a new type at once.
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
"""All adapter types, in the order in which `identify` tries them."""


def named(name: str) -> AdapterType:
    """Return the adapter type called `name`. Raises `KeyError` if none is."""
    return {adapter_type.name: adapter_type for adapter_type in TYPES}[name]


# Some of the functions in an adapter type are closures or lambdas, which pickle cannot find by name. The adapter type
# itself has a name, so that is what a pickle contains.
copyreg.pickle(AdapterType, lambda adapter_type: (named, (adapter_type.name,)))


def identify(tensors: Tensors) -> AdapterType | None:
    """Return the adapter type that a layer with these tensors, by name, is of; `None` if no type recognises them."""
    for adapter_type in TYPES:
        if not adapter_type.identified_by.isdisjoint(tensors) and adapter_type.claims(tensors):
            return adapter_type
    return None


def for_config(config: AdapterConfig) -> AdapterType:
    """Return the adapter type that these settings select.

    Raises:
        AdapterError: No type uses settings of this class.
    """
    for adapter_type in TYPES:
        if adapter_type.config is type(config) and adapter_type.selects(config):
            return adapter_type
    raise AdapterError(f"{type(config).__name__} belongs to no adapter type")
