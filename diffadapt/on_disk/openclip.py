"""OpenCLIP's names for the layers of a CLIP text encoder, as in the single files of SD 2.x and SDXL.

Source: diffusers 0.42.1 `loaders/single_file_utils.py` (`convert_open_clip_checkpoint`).
"""

import re

PREFIXES = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    # The refiner of SDXL has only this text encoder.
    "conditioner.embedders.0.model.": "text_encoder_2",
}
"""Prefix in a single file -> component."""

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": ("layer_norm1",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
    "attn.out_proj": ("self_attn.out_proj",),
    "attn.in_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
_OUTSIDE = {
    "token_embedding": ("embeddings.token_embedding",),
    "positional_embedding": ("embeddings.position_embedding",),
    "ln_final": ("final_layer_norm",),
    "text_projection": ("text_projection",),
}
TRANSPOSED = ("text_projection",)
"""Layers that OpenCLIP stores as (inputs, outputs)."""


def in_transformers(path: str) -> tuple[str, ...]:
    """Return transformers' names of a layer of OpenCLIP, several if it is fused; () for a name that it does not have.

    Args:
        path: the layer's path below the prefix.
    """
    block = _BLOCK.fullmatch(path)
    if block is None:
        return _OUTSIDE.get(path, ())
    return tuple(f"encoder.layers.{block[1]}.{name}" for name in _IN_BLOCK.get(block[2], ()))
