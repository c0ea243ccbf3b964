"""IP-Adapter FaceID: the LoRA for the UNet's attention that the file of such an IP-Adapter contains, at a scale of 1.

Keys are `ip_adapter.<n>.to_q_lora.down.weight`, where n counts the UNet's attention layers. The image projection and
the attention to the image in the same file are for `pipe.load_ip_adapter()`, which also loads the LoRA if peft is
installed. Source: diffusers 0.42.1 `loaders/unet.py`, `_load_ip_adapter_loras`.
"""

import re

from diffadapt.formats.format import Format, Header
from diffadapt.formats.names import Names
from diffadapt.formats.verdicts import Unused, Verdict

_LORA = re.compile(r"(?:ip_adapter\.)?(\d{1,6})\.(to_(?:[qkv]|out))_lora\.(down|up)\.weight")
_REST = re.compile(r"image_proj\.|(?:ip_adapter\.)?\d+\.to_[kv]_ip\.weight")


def _matches(header: Header) -> bool:
    return any(map(_LORA.fullmatch, header.keys))


def _locate(header: Header, names: Names) -> dict[str, Verdict]:
    denoiser, attention = names.denoiser, _attention(names)
    verdicts: dict[str, Verdict] = {}
    for key in header.keys:
        found = _LORA.fullmatch(key)
        if found is None and _REST.match(key):
            verdicts[key] = Unused("the IP-Adapter itself, which pipe.load_ip_adapter() loads", harmless=True)
        elif found is None:
            verdicts[key] = Unused("a name unlike the others in this file")
        elif attention is not None and int(found[1]) >= len(attention):
            reason = f"it is for attention layer {int(found[1])}, and {denoiser} has {len(attention)}, counted from 0"
            verdicts[key] = Unused(reason, denoiser)
        else:
            owner = found[1] if attention is None else attention[int(found[1])]
            layer = "to_out.0" if found[2] == "to_out" else found[2]
            verdicts[key] = names.dotted(denoiser, f"{owner}.{layer}", f"lora_{found[3]}")
    return verdicts


def _attention(names: Names) -> list[str] | None:
    """Return the paths of the attention layers in the order of diffusers' `attn_processors`; `None` without a model."""
    if names.models is None:
        return None
    targets = names.models.get(names.denoiser)
    modules = () if targets is None else targets.model.named_modules()
    return [path for path, module in modules if hasattr(module, "get_processor")]


FACEID = Format("ip-adapter-faceid", _matches, _locate)
