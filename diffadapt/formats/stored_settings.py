"""Settings in the metadata of files in LyCORIS' layout, of adapter types that LyCORIS does not have.

The entry `adapter_settings` is a JSON object: name of the adapter type -> its settings; see `AdapterType.settings`.
Only settings that differ from the defaults are in it.
"""

import json
from collections.abc import Iterable, Mapping

from diffadapt.errors import AdapterError
from diffadapt.formats.format import Header, Settings
from diffadapt.formats.metadata import finite_number, parse_json
from diffadapt.formats.network_args import settings_of_tlora
from diffadapt.formats.peft_methods import BY_TYPE
from diffadapt.types import named
from diffadapt.types.layer_state import LayerState

ENTRY = "adapter_settings"


def entry(layers: Iterable[LayerState]) -> dict[str, str]:
    """Return the entry of the metadata for these layers, or nothing if all settings are the defaults.

    Raises:
        AdapterError: layers of one type have different settings.
    """
    found: dict[str, dict[str, float]] = {}
    for layer in layers:
        if layer.type in BY_TYPE:
            defaults = named(layer.type).settings
            own = {name: value for name, value in layer.settings.items() if value != defaults.get(name)}
            if found.setdefault(layer.type, own) != own:
                raise AdapterError(f"this format has one place for the settings of a {layer.type}, and they differ")
    stored = {type: own for type, own in found.items() if own}
    return {ENTRY: json.dumps(stored, sort_keys=True)} if stored else {}


def with_stored(settings: Settings, header: Header) -> Settings:
    """Return a function that adds the settings in the metadata to those that a format finds.

    A trainer's notes on a T-LoRA are among them, too.

    Raises:
        AdapterError: the entry is not an object of numbers.
    """
    stored: dict[str, dict[str, float]] = {}
    noted = settings_of_tlora(header)
    if noted:
        stored["tlora"] = noted
    parsed = parse_json(header.metadata.get(ENTRY, "{}"), ENTRY)
    for type, own in parsed.items() if isinstance(parsed, Mapping) else [("", None)]:  # type: ignore[misc]
        if not isinstance(own, Mapping) or type not in BY_TYPE or not own.keys() <= named(type).settings.keys():  # type: ignore[arg-type]
            raise AdapterError(f"{ENTRY} in the file's metadata is no object of settings by adapter type")
        stored[type] = {name: finite_number(value, name) for name, value in own.items()}  # type: ignore[misc]
    if not stored:
        return settings
    return lambda component, path, type: {**stored.get(type, {}), **settings(component, path, type)}
