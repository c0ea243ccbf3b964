"""What trainers wrote about LyCORIS' settings (`ss_network_args`), as far as the tensors of a file depend on it."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffadapt.errors import AdapterError, Fault
from diffadapt.formats.format import Header
from diffadapt.formats.metadata import parse_json
from diffadapt.types.singular import STARTS

_ENTRY = "ss_network_args"
_USUAL_BLOCK = 4


def start_of_tlora(header: Header) -> dict[str, float]:
    """Return the settings of a T-LoRA: the components that its training began with, if the header says so."""
    given = _arguments(header)
    if _algorithm(given) != "tlora":
        return {}
    if str(given.get("use_data_init", True)).lower() in ("false", "0"):
        return {"start": float(STARTS.index("random"))}
    start = given.get("sig_type", "principal")
    return {"start": float(STARTS.index(start))} if start in STARTS else {}


def notes(header: Header) -> Iterable[Fault]:
    """Yield a note on a DyLoRA of LyCORIS, which was stronger in training than it is in its file."""
    given = _arguments(header)
    if _algorithm(given) != "dylora":
        return
    size = given.get("block_size", _USUAL_BLOCK)
    size = int(size) if str(size).isdigit() else _USUAL_BLOCK
    if size > 1:
        yield Fault(
            _ENTRY,
            f"a DyLoRA of LyCORIS with blocks of {size}: it was {size} times as strong in training as its file says, "
            f"and as it is loaded; a strength of {size} restores that",
        )


def _arguments(header: Header) -> Mapping[str, Any]:
    if not str(header.metadata.get("ss_network_module", "")).startswith("lycoris"):
        return {}
    try:
        found = parse_json(header.metadata.get(_ENTRY, "{}"), _ENTRY)
    except AdapterError:
        # It is a note of the trainer, which most files can do without.
        return {}
    return found if isinstance(found, Mapping) else {}  # type: ignore[return-value]


def _algorithm(arguments: Mapping[str, Any]) -> str:
    return str(arguments.get("algo", "")).lower()
