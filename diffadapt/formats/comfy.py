"""ComfyUI's names: those of the original checkpoint, with dots.

`diffusion_model.<path>.lora_A.weight` and `text_encoders.<which>.transformer.<path in transformers>.lora_A.weight`,
with an alpha tensor or without, which means a scale of 1. What diffusers has as models of their own beside the
transformer (Anima's `llm_adapter`, LTX-2's connectors) is under `diffusion_model.` too, but for LTX-2's
`text_embedding_projection.`, which has nothing in front. ai-toolkit, diffusion-pipe, OneTrainer and ComfyUI itself
write them. Sources: ComfyUI `comfy/lora.py`, diffusers 0.42.1 `loaders/lora_conversion_utils.py`, ai-toolkit 27a03a9
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
    return suffixes.located(header.keys, lambda path, name: prefixes.place(path, name, names))


COMFY = Format(
    "comfy",
    _matches,
    _locate,
    lambda header: lambda component, path, rank: None,
    dump_comfy,
    original=lambda family: True,
)
