"""ComfyUI's names: those of the original checkpoint, with dots.

`diffusion_model.<path>.lora_A.weight` and `text_encoders.<which>.transformer.<path in transformers>.lora_A.weight`,
with an alpha tensor or without, which means a scale of 1. What diffusers has as models of their own beside the
transformer (Anima's `llm_adapter`, LTX-2's connectors) is under `diffusion_model.` too, but for LTX-2's
`text_embedding_projection.`, which has nothing in front. ai-toolkit, diffusion-pipe, OneTrainer and ComfyUI itself
write them. Sources: ComfyUI `comfy/lora.py`, diffusers 0.42.1 `loaders/lora_conversion_utils.py`, ai-toolkit 27a03a9
`extensions_built_in/diffusion_models/wan22/`.
"""

import re
from collections.abc import Sequence

from diffadapt.formats import suffixes
from diffadapt.formats.format import Format, Header, Names, Unused, Verdict
from diffadapt.formats.lycoris_dump import TOP, dump_comfy

_DENOISER = "diffusion_model."
_SIGN = re.compile(r"diffusion_model\.|text_encoders\.")
_EXPERT = re.compile(r"transformer_(\d)\.")
_TEXT_ENCODER = re.compile(r"text_encoders\.(?:(?!transformer\.)(\w+)\.)?(?:transformer\.)?")
_NUMBERED = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_CLIP = {"clip_l": ("text_encoder", "text_encoder_2"), "clip_g": ("text_encoder_2",), "clip_h": ("text_encoder",)}


def _matches(header: Header) -> bool:
    return any(map(_SIGN.match, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    def place(path: str, name: str) -> Verdict:
        text_encoder = _TEXT_ENCODER.match(path)
        if text_encoder:
            return names.first(_text_encoders(text_encoder[1] or ""), path[text_encoder.end() :], name)
        if not path.startswith((_DENOISER, TOP)):
            return Unused(f"a name without the {_DENOISER!r} that others in this file have")
        path = path.removeprefix(_DENOISER)
        expert = _EXPERT.match(path)
        if expert:
            # Wan 2.2 in one file: the high-noise model and the low-noise one.
            component = "transformer" if expert[1] == "1" else f"transformer_{expert[1]}"
            return names.dotted(component, path[expert.end() :], name)
        return names.first(names.owners(path), path, name)

    return suffixes.located(header.keys, place)


def _text_encoders(which: str) -> Sequence[str]:
    """Which components ComfyUI's name of a text encoder may mean, the likeliest first."""
    if "t5" in which:
        return "text_encoder_3", "text_encoder_2", "text_encoder"
    return _CLIP.get(which, _NUMBERED)


COMFY = Format(
    "comfy",
    _matches,
    _locate,
    lambda header: lambda component, path, rank: None,
    dump_comfy,
    original=lambda family: True,
)
