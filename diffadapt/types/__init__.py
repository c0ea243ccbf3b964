"""The registry of adapter types. To add a type, add a module to this package and an entry to `TYPES`.

The tests iterate over `TYPES`, so they cover a new type at once.
"""

import copyreg

from diffadapt.errors import AdapterError
from diffadapt.types.adalora import ADALORA
from diffadapt.types.adamss import ADAMSS
from diffadapt.types.adapter_type import AdapterType, Tensors
from diffadapt.types.batch_norm import BATCH_NORM
from diffadapt.types.boft import BOFT
from diffadapt.types.c3a import C3A
from diffadapt.types.config import AdapterConfig
from diffadapt.types.deft import DEFT
from diffadapt.types.delora import DELORA
from diffadapt.types.dora import DORA
from diffadapt.types.dylora import DYLORA
from diffadapt.types.fourierft import FOURIERFT
from diffadapt.types.frod import FROD
from diffadapt.types.full import FULL
from diffadapt.types.glora import GLORA
from diffadapt.types.glora_peft import GLORA_PEFT
from diffadapt.types.gralora import GRALORA
from diffadapt.types.hira import HIRA
from diffadapt.types.hra import HRA
from diffadapt.types.ia3 import IA3
from diffadapt.types.layer_spec import LayerSpec
from diffadapt.types.loha import LOHA
from diffadapt.types.lokr import LOKR
from diffadapt.types.lora import LORA
from diffadapt.types.miss import MISS
from diffadapt.types.oft import OFT
from diffadapt.types.parameter import PARAMETER
from diffadapt.types.peanut import PEANUT
from diffadapt.types.psoft import PSOFT
from diffadapt.types.randlora import RANDLORA
from diffadapt.types.road import ROAD
from diffadapt.types.shira import SHIRA
from diffadapt.types.singular import OSF, TLORA
from diffadapt.types.started_lora import STARTED_LORA
from diffadapt.types.supertuning import SUPERTUNING
from diffadapt.types.tinylora import TINYLORA
from diffadapt.types.tokens import TOKENS
from diffadapt.types.unilora import UNILORA
from diffadapt.types.vblora import VBLORA
from diffadapt.types.vera import VERA
from diffadapt.types.waveft import WAVEFT

TYPES: tuple[AdapterType, ...] = (
    ADALORA,
    *DORA,
    STARTED_LORA,
    DYLORA,
    LORA,
    LOHA,
    LOKR,
    OFT,
    BOFT,
    *IA3,
    GLORA,
    MISS,
    GRALORA,
    DELORA,
    HIRA,
    DEFT,
    ROAD,
    HRA,
    PSOFT,
    C3A,
    FOURIERFT,
    WAVEFT,
    SHIRA,
    BATCH_NORM,
    *VERA,
    RANDLORA,
    VBLORA,
    UNILORA,
    PEANUT,
    SUPERTUNING,
    GLORA_PEFT,
    TINYLORA,
    OSF,
    TLORA,
    FROD,
    ADAMSS,
    FULL,
    TOKENS,
    PARAMETER,
)
"""All adapter types, in the order in which `identify` tries them."""


def named(name: str) -> AdapterType:
    """Return the adapter type called `name`. Raises `KeyError` if none is."""
    return {adapter_type.name: adapter_type for adapter_type in TYPES}[name]


# Some of the functions in an adapter type are closures or lambdas, which pickle cannot find by name. The adapter type
# itself has a name, so that is what a pickle contains.
copyreg.pickle(AdapterType, lambda adapter_type: (_rebuilt, (adapter_type.name, adapter_type.twin_of)))


def _rebuilt(name: str, twin_of: LayerSpec | None) -> AdapterType:
    from diffadapt.types.mirrored import mirrored

    return named(name) if twin_of is None else mirrored(name, twin_of)


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
