"""ComfyUI: the names of the original checkpoint, with dots.

Keys are `diffusion_model.<path>.lora_A.weight` and
`text_encoders.<text encoder>.transformer.<path in transformers>.lora_A.weight`. Some files have alpha tensors; without
them the scale is 1. Models that diffusers has as separate components next to the transformer (Anima's `llm_adapter`,
LTX-2's connectors) are under `diffusion_model.` too, except for LTX-2's `text_embedding_projection.`, which has no
prefix. The format is written by ai-toolkit, diffusion-pipe, OneTrainer and ComfyUI itself. Sources: ComfyUI
`comfy/lora.py`, diffusers 0.42.1 `loaders/lora_conversion_utils.py`, ai-toolkit 27a03a9
`extensions_built_in/diffusion_models/wan22/`.
"""

from diffadapt.formats import prefixes, suffixes
from diffadapt.formats.format import Format, Header
from diffadapt.formats.lycoris_dump import dump_comfy
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict


def _matches(header: Header) -> bool:
    return any(map(prefixes.COMFY.match, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    return suffixes.locate_keys(header.keys, lambda path, name: prefixes.place(path, name, names))


COMFY = Format("comfy", _matches, _locate, dump_comfy, original=lambda family: True)
