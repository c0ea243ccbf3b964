"""Flattened names: kohya-ss/sd-scripts, LyCORIS and OneTrainer, for every family, with an alpha for every layer.

`lora_unet_<path with "_" for ".">.lora_down.weight`; text encoders under `lora_te_`, or `lora_te1_`, `lora_te2_` and so
on where there are several. Names are those of diffusers or of the model's original layout. Other prefixes are
`lora_transformer_` (OneTrainer), `lycoris_` (LyCORIS by itself), `oft_unet_` (sd-scripts' OFT, whose alpha is always a
limit) and `lora_prior_` (Stable Cascade). sd-scripts' OFT for Flux has `oft_blocks.0` and so on, one for each part of a
fused projection, under one alpha. Flattening loses information, so names are looked up in a table built from
the model's own paths. Source: sd-scripts 48d368f `networks/lora.py`, `networks/oft.py`, `networks/oft_flux.py`;
OneTrainer 23df383.
"""

import re

from diffadapt.formats import prefixes, suffixes
from diffadapt.formats.format import Alphas, Format, Header, Settings
from diffadapt.formats.lycoris_dump import ALWAYS_LIMITED, dump_kohya, dump_onetrainer, is_original
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict

_SPLIT_OFT = re.compile(r"(.+)\.(oft_blocks\.(?:0|[1-9]\d{0,2}))")


def _matches(header: Header) -> bool:
    return any(map(prefixes.FLAT.match, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    keys = set(header.keys)

    def place(path: str, name: str) -> Verdict:
        if path.startswith("oft_") and f"{path}.alpha" not in keys:
            return Unused("sd-scripts limits every rotation by an alpha, which is missing")
        return prefixes.place(path, name, names)

    verdicts = suffixes.located(header.keys, place)
    for key in header.keys:
        part = _SPLIT_OFT.fullmatch(key) if ".oft_blocks." in key else None
        if part:
            verdicts[key] = place(part[1], part[2])
    return verdicts


def _alphas(header: Header) -> Alphas:
    # ss_network_alpha is one number for files that have one per layer; the alpha tensors are the truth.
    return lambda component, path, rank: None


def _settings(header: Header) -> Settings:
    limited = any(key.startswith("oft_") for key in header.keys)
    return lambda component, path, type: ALWAYS_LIMITED if limited and type == "oft" else {}


KOHYA = Format("kohya", _matches, _locate, _alphas, dump_kohya, _settings, original=is_original)
ONETRAINER = Format("onetrainer", lambda header: False, _locate, _alphas, dump_onetrainer)
"""Only written under this name; read, it is one of the prefixes above."""
