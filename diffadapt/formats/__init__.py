"""File formats: names and layouts, no mathematics. A new format is one file in this folder and one line here.

Exactly one format must match a file; the tests give every fixture to every format.
"""

from dataclasses import replace
from functools import partial

from diffadapt.errors import AdapterError
from diffadapt.formats.advice import dump_or_advise
from diffadapt.formats.bfl_control import BFL_CONTROL
from diffadapt.formats.cloneofsimo import CLONEOFSIMO
from diffadapt.formats.comfy import COMFY
from diffadapt.formats.control_lora import CONTROL_LORA
from diffadapt.formats.diffusers import DIFFUSERS
from diffadapt.formats.embeddings import EMBEDDINGS
from diffadapt.formats.faceid import FACEID
from diffadapt.formats.foreign import CONTROLNET_LLLITE, IP_ADAPTER
from diffadapt.formats.format import Format, Header
from diffadapt.formats.kohya import KOHYA, ONETRAINER
from diffadapt.formats.peft import PEFT
from diffadapt.formats.xlabs import XLABS

_TIERS: tuple[tuple[Format, ...], ...] = (
    # Its names may have the prefix of another format.
    (XLABS,),
    # Formats with names that no other program writes.
    (PEFT, KOHYA, COMFY, CLONEOFSIMO, BFL_CONTROL, CONTROL_LORA, FACEID, CONTROLNET_LLLITE),
    # The LoRA of FaceID is inside an IP-Adapter file.
    (IP_ADAPTER,),
    (DIFFUSERS,),
    # Files without any layer.
    (EMBEDDINGS,),
)
"""The order in which formats are asked. A tier is asked only about files that no earlier tier recognises."""

_MIXED = (PEFT, KOHYA, COMFY)
"""Formats whose names are mixed in some files. Each of them also reads the names of the others; only the first one has
a config, so it takes precedence."""

FORMATS: tuple[Format, ...] = tuple(format for tier in _TIERS for format in tier)


def matching(header: Header) -> list[Format]:
    """Return the formats that recognise a file.

    That is exactly one, unless the file is not an adapter or mixes several formats.
    """
    return next((found for tier in _TIERS if (found := [f for f in tier if f.matches(header)])), [])


def detect(header: Header, name: str | None = None) -> Format:
    """Return the format of a file.

    Args:
        header: the header of the file.
        name: the name of the format, if the caller knows it.

    Raises:
        AdapterError: no format recognises the keys, or several that exclude each other do; or `name` is unknown, or its
            format does not recognise the keys.
    """
    if name is not None:
        named = {format.name: format for format in FORMATS}
        if name not in named:
            raise AdapterError(f"format={name!r} is not known; use one of {', '.join(named)}")
        if not named[name].matches(header):
            shown = ", ".join(header.keys[:5]) or "no tensors at all"
            raise AdapterError(f"format={name!r} cannot be used: the file has no name of that format, but {shown}")
        return named[name]
    found = matching(header)
    if found and set(found) <= set(_MIXED):
        return found[0]
    if len(found) == 1:
        return found[0]
    shown = ", ".join(header.keys[:5]) or "no tensors at all"
    if not found:
        known = ", ".join(format.name for format in FORMATS)
        raise AdapterError(f"this is no adapter in a known format ({known}): it holds {shown}")
    raise AdapterError(f"ambiguous: {' and '.join(f.name for f in found)} both recognise {shown}")


def writer(name: str) -> Format:
    """Return the format of this name, for writing. If it cannot express an adapter, its `dump` says which formats can.

    Raises:
        AdapterError: no format has this name, or the format is read-only.
    """
    writable = {format.name: format for format in (*FORMATS, ONETRAINER) if format.dump is not None}
    if name not in writable:
        raise AdapterError(f"format={name!r} cannot be written; use one of {', '.join(sorted(writable))}")
    chosen = writable[name]
    return replace(chosen, dump=partial(dump_or_advise, chosen, tuple(writable.values())))
