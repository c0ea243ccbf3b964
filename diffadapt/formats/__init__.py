"""File formats: names and layouts, no math. Adding one is one file beside this one and one line here.

Exactly one format must match a file; `tests/` feeds every fixture to every detector.
"""

from diffadapt.errors import AdapterError
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
    # Those whose names nobody else writes.
    (PEFT, KOHYA, COMFY, CLONEOFSIMO, XLABS, BFL_CONTROL, CONTROL_LORA, FACEID, CONTROLNET_LLLITE),
    # FaceID's LoRA comes inside an IP-Adapter.
    (IP_ADAPTER,),
    (DIFFUSERS,),
    # What holds no layer at all.
    (EMBEDDINGS,),
)
"""Who is asked first. A later tier is asked only about files that none of an earlier one recognises."""

_MIXED = (PEFT, KOHYA, COMFY)
"""Those whose names stand side by side in some files; each reads the others', and the first has a config."""

FORMATS: tuple[Format, ...] = tuple(format for tier in _TIERS for format in tier)


def matching(header: Header) -> list[Format]:
    """The formats that recognise a file: one, unless it is no adapter, or several were mixed up in it."""
    return next((found for tier in _TIERS if (found := [f for f in tier if f.matches(header)])), [])


def detect(header: Header, name: str | None = None) -> Format:
    """The format of a file.

    Args:
        name: what a caller says it is.

    Raises:
        AdapterError: no format, or more than one, recognises the names; or there is none of that name.
    """
    if name is not None:
        named = {format.name: format for format in FORMATS}
        if name not in named:
            raise AdapterError(f"format={name!r} is not known; use one of {', '.join(named)}")
        if not named[name].matches(header):
            shown = ", ".join(header.keys[:5]) or "no tensors at all"
            raise AdapterError(f"format={name!r} cannot be used: there is no name of that format, but {shown}")
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
    """The format of this name, to write in.

    Raises:
        AdapterError: there is none, or it is only read.
    """
    writable = {format.name: format for format in (*FORMATS, ONETRAINER) if format.dump is not None}
    if name not in writable:
        raise AdapterError(f"format={name!r} cannot be written; use one of {', '.join(sorted(writable))}")
    return writable[name]
