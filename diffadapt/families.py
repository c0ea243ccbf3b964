"""Model families, by what a model is and by what a file's names and shapes give away."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_BY_WIDTH = {768: "sd", 1024: "sd2", 2048: "sdxl"}
"""Width of the text embedding that cross-attention reads in the Stable Diffusion UNets."""

_BY_NAME = (
    ("flux", re.compile(r"single_transformer_blocks|double_blocks|single_blocks")),
    ("sd3", re.compile(r"joint_blocks|transformer_blocks[._]\d+[._](ff_context|norm1_context)")),
)


def of_models(components: Mapping[str, nn.Module]) -> str | None:
    """Family of a pipeline's components: "sd", "sd2", "sdxl", "sd3", "flux", or the denoiser's class in lower case."""
    for name in ("unet", "transformer", "prior", "decoder", *components):
        model = components.get(name)
        if model is None:
            continue
        kind = type(model).__name__
        if kind.startswith("UNet"):
            return _of_unet(getattr(model, "config", None))
        if "Transformer" in kind:
            return re.sub(r"Transformer(\w?D)?(\d?D)?(Model)?$", "", kind).lower() or None
    return None


def of_file(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str | None:
    """Family of a file from `(key, shape)` pairs, or `None` where they do not tell."""
    for key, shape in shapes:
        if (
            re.search(r"attn2[._](processor\.)?to_[kv]\b.*(down|lora_A)", key.replace("_lora", ".lora"))
            and len(shape) > 1
        ):
            return _BY_WIDTH.get(shape[1])
        for family, names in _BY_NAME:
            if names.search(key):
                return family
    return None


def _of_unet(config: Any) -> str:
    if getattr(config, "addition_embed_type", None) == "text_time":
        return "sdxl"
    width = getattr(config, "cross_attention_dim", None)
    return "sd2" if width == 1024 else "sd"
