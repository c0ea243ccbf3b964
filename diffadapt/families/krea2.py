"""Krea 2: the layout of Krea's code.

Source: diffusers 0.42.1 `loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`.
"""

from diffadapt.families.family import Family, Table, block

_BLOCK: Table = {
    "prenorm": "norm1",
    "postnorm": "norm2",
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm": "attn.norm_q",
    "attn.qknorm.knorm": "attn.norm_k",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}

KREA2 = Family(
    "krea2",
    ("Krea2Transformer2DModel",),
    signs=r"blocks~~attn~w[qkvo]\.|blocks~~(?:attn|mlp)~gate|txtfusion|text_fusion|transformer_blocks~~attn~to_gate\.",
    layers={
        **block("blocks.{}", "transformer_blocks.{}", _BLOCK),
        **block("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}", _BLOCK),
        **block("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}", _BLOCK),
        "txtfusion.projector": "text_fusion.projector",
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.0": "txt_in.norm",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "last.norm": "final_layer.norm",
        "last.linear": "final_layer.linear",
    },
)
