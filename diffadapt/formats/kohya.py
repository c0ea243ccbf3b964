"""Flattened names: kohya-ss/sd-scripts, LyCORIS and OneTrainer, for every family, with an alpha for every layer.

Keys are `lora_unet_<path with "_" for ".">.lora_down.weight`; text encoders have the prefix `lora_te_`, or `lora_te1_`,
`lora_te2_` and so on if there are several. Names come from diffusers or from the model's original layout. Other
prefixes are `lora_transformer_` (OneTrainer), `lycoris_` (LyCORIS by itself), `oft_unet_` (sd-scripts' OFT, whose alpha
is always a limit) and `lora_prior_` (Stable Cascade). sd-scripts' OFT for Flux has `oft_blocks.0` and so on, one for
each part of a fused projection, with a common alpha. Flattening loses information, so names are looked up in a table
that is built from the model's own paths. Sources: sd-scripts 48d368f `networks/lora.py`, `networks/oft.py`,
`networks/oft_flux.py`; OneTrainer 23df383.
"""

import re

from diffadapt.formats import prefixes, suffixes
from diffadapt.formats.format import Format, Header, Settings
from diffadapt.formats.lycoris_dump import ALWAYS_LIMITED, dump_kohya, dump_onetrainer, is_original
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict

_NUMBERED_OFT = re.compile(r"(.+)\.(oft_blocks\.(?:0|[1-9]\d{0,2}))")


def _matches(header: Header) -> bool:
    return any(map(prefixes.FLAT.match, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    keys = set(header.keys)

    def place(path: str, name: str) -> Verdict:
        if path.startswith("oft_") and f"{path}.alpha" not in keys:
            return Unused("sd-scripts limits every rotation by an alpha, which is missing")
        return prefixes.place(path, name, names)

    verdicts = suffixes.locate_keys(header.keys, place)
    for key in header.keys:
        numbered = _NUMBERED_OFT.fullmatch(key) if ".oft_blocks." in key else None
        if numbered:
            verdicts[key] = place(numbered[1], numbered[2])
    return verdicts


def _settings(header: Header) -> Settings:
    limited = any(key.startswith("oft_") for key in header.keys)
    return lambda component, path, type: ALWAYS_LIMITED if limited and type == "oft" else {}


KOHYA = Format("kohya", _matches, _locate, dump_kohya, settings=_settings, original=is_original)
ONETRAINER = Format("onetrainer", lambda header: False, _locate, dump_onetrainer)
"""A format for writing only; its files are read as `KOHYA`."""
