"""File formats: names and layouts, no math. Adding one is one file beside this one and one line here.

Exactly one format must match a file; `tests/` feeds every fixture to every detector.
"""

from diffadapt.errors import AdapterError
from diffadapt.formats.diffusers import DIFFUSERS
from diffadapt.formats.format import Format, Header
from diffadapt.formats.kohya import KOHYA
from diffadapt.formats.peft import PEFT

FORMATS: tuple[Format, ...] = (KOHYA, PEFT, DIFFUSERS)


def detect(header: Header) -> Format:
    """The format of a file.

    Raises:
        AdapterError: no format, or more than one, recognises the names.
    """
    matching = [format for format in FORMATS if format.matches(header)]
    if len(matching) == 1:
        return matching[0]
    shown = ", ".join(header.keys[:5]) or "no tensors at all"
    if not matching:
        known = ", ".join(format.name for format in FORMATS)
        raise AdapterError(f"this is no adapter in a known format ({known}): it holds {shown}")
    raise AdapterError(f"ambiguous: {' and '.join(f.name for f in matching)} both recognise {shown}")


def writer(name: str) -> Format:
    """The format of this name, to write in.

    Raises:
        AdapterError: there is none, or it is only read.
    """
    writable = {format.name: format for format in FORMATS if format.dump is not None}
    if name not in writable:
        raise AdapterError(f"format={name!r} cannot be written; use one of {', '.join(sorted(writable))}")
    return writable[name]
