"""XLabs' LoRAs for Flux.1: factors on the attention processors of the original layout, at a scale of 1.

Keys are `double_blocks.<n>.processor.qkv_lora1.down.weight`, where `qkv_lora1` is for the image stream and `qkv_lora2`
for the text stream; single blocks have `qkv_lora` without a number. Some programs put ComfyUI's or diffusers' prefix in
front. Source: XLabs-AI/x-flux 4749542
`src/flux/modules/layers.py`.
"""

import re

from diffadapt.formats import prefixes, suffixes
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Verdict

_KEY = re.compile(
    r"(?:diffusion_model\.|transformer\.)?(?:(double)|single)_blocks\.(\d+)\.processor\."
    r"(qkv|proj)_lora([12])?\.(?:(down)|up)\.weight"
)


def _matches(header: Header) -> bool:
    return any(map(_KEY.fullmatch, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    verdicts = suffixes.locate_keys(header.keys, lambda path, name: prefixes.place(path, name, names))
    denoiser = names.denoiser
    for key in header.keys:
        match = _KEY.fullmatch(key)
        if match is None or (match[1] is None) != (match[4] is None):
            continue
        name = "lora_down" if match[5] else "lora_up"
        if match[1]:
            stream = "img" if match[4] == "1" else "txt"
            verdicts[key] = names.dotted(denoiser, f"double_blocks.{match[2]}.{stream}_attn.{match[3]}", name)
        elif match[3] == "proj":
            verdicts[key] = names.dotted(denoiser, f"single_blocks.{match[2]}.linear2", name)
        else:
            # The first layer of a single block also contains the feed-forward, which this factor does not cover.
            paths = [f"single_transformer_blocks.{match[2]}.attn.to_{letter}" for letter in "qkv"]
            verdicts[key] = names.fused(denoiser, key.rsplit(".", 2)[0], paths, name)
    return verdicts


XLABS = Format("xlabs", _matches, _locate)
