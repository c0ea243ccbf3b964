"""XLabs' LoRAs for Flux.1: factors on the attention processors of the original layout, at a scale of 1.

`double_blocks.<n>.processor.qkv_lora1.down.weight`, where 1 is the image's stream and 2 the text's, and `qkv_lora`
without a number in single blocks. Source: XLabs-AI/x-flux 4749542 `src/flux/modules/layers.py`.
"""

import re

from diffadapt.formats import suffixes
from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict

_KEY = re.compile(r"(?:(double)|single)_blocks\.(\d+)\.processor\.(qkv|proj)_lora([12])?\.(?:(down)|up)\.weight")


def _matches(header: Header) -> bool:
    return any(map(_KEY.fullmatch, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    verdicts = suffixes.located(header.keys, lambda path, name: Unused("a name unlike the others in this file"))
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
            # Of the first layer of a single block, query, key and value only.
            paths = [f"single_transformer_blocks.{match[2]}.attn.to_{part}" for part in "qkv"]
            verdicts[key] = names.parts(denoiser, key.rsplit(".", 2)[0], paths, name)
    return verdicts


XLABS = Format("xlabs", _matches, _locate, lambda header: lambda component, path, rank: None, None)
