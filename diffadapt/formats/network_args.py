"""What trainers wrote about LyCORIS' settings (`ss_network_args`), as far as the tensors of a file depend on it."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffadapt.errors import AdapterError, Fault
from diffadapt.formats.format import Header
from diffadapt.formats.metadata import finite_number, parse_json
from diffadapt.types.singular import STARTS

_ENTRY = "ss_network_args"
_USUAL_BLOCK = 4


def settings_of_tlora(header: Header) -> dict[str, float]:
    """Return the settings of a T-LoRA, as far as the header knows them.

    They are the components that its training began with, and how many act at a timestep, by the names of the paper's
    code or of SimpleTuner.

    Raises:
        AdapterError: a setting is no number, or none that can be.
    """
    given = _arguments(header)
    if _algorithm(given) != "tlora":
        return {}
    found: dict[str, float] = {}
    for name, other in (("min_rank", "tlora_min_rank"), ("alpha_rank_scale", "tlora_alpha")):
        value = given.get(name, given.get(other))
        if value is not None:
            found[name] = _number(value, name)
    if found.get("min_rank", 0) < 0 or found.get("alpha_rank_scale", 1) <= 0:
        raise AdapterError(f"{_ENTRY} in the file's metadata has {found}, expected min_rank >= 0, alpha_rank_scale > 0")
    start = given.get("sig_type", "principal")
    if str(given.get("use_data_init", True)).lower() in ("false", "0"):
        start = "random"
    return {**found, "start": float(STARTS.index(start))} if start in STARTS else found


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


def _number(value: Any, name: str) -> float:
    try:
        return finite_number(float(value), name)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{name}={value!r} in the file's {_ENTRY} is no number") from error


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
