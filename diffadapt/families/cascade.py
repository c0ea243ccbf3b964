"""Stable Cascade, prior and decoder. The original has an `nn.MultiheadAttention`, whose projections files number.

Source: OneTrainer 23df383 `modules/util/convert/lora/`. Its older files have the names in `also`.
"""

from diffadapt.families.family import Family, Table

_ATTENTIONS = [f"{side}_blocks.{{}}.{{}}.attention" for side in ("down", "up")]


def _layers(*names: str) -> Table:
    ours = ("to_q", "to_k", "to_v", "to_out.0")
    return {
        f"{attention}.{name}": f"{attention}.{own}"
        for attention in _ATTENTIONS
        for name, own in zip(names, ours, strict=True)
    }


CASCADE = Family(
    "cascade",
    ("StableCascadeUNet",),
    signs="(?:down|up)_blocks~~~(?:attention|channelwise|depthwise|mapper|kv_mapper)",
    layers={
        **_layers("attn.in_proj.0", "attn.in_proj.1", "attn.in_proj.2", "attn.out_proj"),
        "clip_mapper": "clip_txt_pooled_mapper",
    },
    also=_layers("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
)
