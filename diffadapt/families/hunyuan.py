"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1: the layout of Tencent's code.

Sources: diffusers 0.42.1 `loaders/single_file_utils.py` and, for the last two, its conversion scripts; sd-scripts
209c02d `library/hunyuan_image_modules.py` for the layers that trainers fuse; diffusion-pipe for ComfyUI's names of the
same layers.
"""

from diffadapt.families.family import Family, Table, block, qkv
from diffadapt.families.flux import GUIDANCE

_DOUBLE: Table = {
    "img_attn_qkv": qkv("attn.to_"),
    "img_attn_proj": "attn.to_out.0",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "img_mod.linear": "norm1.linear",
    "txt_attn_qkv": qkv("attn.add_", "_proj"),
    "txt_attn_proj": "attn.to_add_out",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
    "txt_mod.linear": "norm1_context.linear",
}
_SINGLE: Table = {
    "linear1": (*qkv("attn.to_"), "proj_mlp"),
    "linear2": "proj_out",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "modulation.linear": "norm.linear",
}
# The two halves of the adaptive norm here are gates, which all programs have in the same order.
_REFINER: Table = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": qkv("attn.to_"),
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_COMMON: Table = {
    **block("double_blocks.{}", "transformer_blocks.{}", _DOUBLE),
    **block("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE),
    **block("txt_in.individual_token_refiner.blocks.{}", "context_embedder.token_refiner.refiner_blocks.{}", _REFINER),
    "img_in.proj": "x_embedder.proj",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SWAPPED = frozenset({"final_layer.adaLN_modulation.1"})
_BYT5: Table = {
    "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.fc1": "context_embedder_2.linear_1",
    "byt5_in.fc2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3",
}
# Fragments of original names -> the same in ComfyUI.
_COMFY = {
    "_attn_qkv": "_attn.qkv",
    "_attn_proj": "_attn.proj",
    "_attn_q_norm": "_attn.norm.query_norm",
    "_attn_k_norm": "_attn.norm.key_norm",
    "}.q_norm": "}.norm.query_norm",
    "}.k_norm": "}.norm.key_norm",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "_mod.linear": "_mod.lin",
    "modulation.linear": "modulation.lin",
    "_embedder.linear_1": "_embedder.in_layer",
    "_embedder.linear_2": "_embedder.out_layer",
    "er.mlp.0": "er.in_layer",
    "er.mlp.2": "er.out_layer",
    "_in.mlp.0": "_in.in_layer",
    "_in.mlp.2": "_in.out_layer",
}
_SPLIT_DOUBLE: Table = {
    f"{stream}_attn_{letter}": name
    for stream in ("img", "txt")
    for letter, name in zip("qkv", _DOUBLE[f"{stream}_attn_qkv"], strict=True)
}
# The code of HunyuanImage and HunyuanVideo 1.5 has separate layers where trainers have fused ones.
_SPLIT: Table = {
    **block("double_blocks.{}", "transformer_blocks.{}", _SPLIT_DOUBLE),
    "single_blocks.{}.linear1_q": "single_transformer_blocks.{}.attn.to_q",
    "single_blocks.{}.linear1_k": "single_transformer_blocks.{}.attn.to_k",
    "single_blocks.{}.linear1_v": "single_transformer_blocks.{}.attn.to_v",
    "single_blocks.{}.linear1_mlp": "single_transformer_blocks.{}.proj_mlp",
    "single_blocks.{}.linear2.fc": "single_transformer_blocks.{}.proj_out",
}


def _comfy(layers: Table) -> Table:
    """Return the table with ComfyUI's names in place of the original ones, without those that are the same."""
    found: dict[str, str | tuple[str, ...]] = {}
    for original, ours in layers.items():
        name = original
        for fragment, comfy in _COMFY.items():
            name = name.replace(fragment, comfy)
        if name != original:
            found[name] = ours
    return found


_VIDEO: Table = {
    **_COMMON,
    "time_in.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.mlp.0": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
}
_VIDEO_15: Table = {
    **_COMMON,
    **_BYT5,
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_embed.timestep_embedder_r.linear_2",
    "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1",
    "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out",
    "cond_type_embedding": "cond_type_embed",
}
_IMAGE: Table = {
    **_COMMON,
    **_BYT5,
    "time_in.mlp.0": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.mlp.2": "time_guidance_embed.timestep_embedder.linear_2",
    "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
    "time_r_in.mlp.2": "time_guidance_embed.timestep_embedder_r.linear_2",
    "guidance_in.mlp.0": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
}

HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    ("HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel"),
    layers=_VIDEO,
    also=_comfy(_VIDEO),
    swapped=_SWAPPED,
    optional=GUIDANCE,
)
HUNYUAN_VIDEO_15 = Family(
    "hunyuan-video15",
    ("HunyuanVideo15Transformer3DModel",),
    signs="cond_type_embed|vision_in~proj",
    layers=_VIDEO_15,
    also={**_comfy(_VIDEO_15), **_SPLIT},
    swapped=_SWAPPED,
)
HUNYUAN_IMAGE = Family(
    "hunyuan-image",
    ("HunyuanImageTransformer2DModel",),
    signs=r"single_blocks~~(?:linear_(?:q|k|v|mlp)|linear~fc)\.",
    layers=_IMAGE,
    also={**_comfy(_IMAGE), **_SPLIT},
    swapped=_SWAPPED,
    optional=GUIDANCE,
)
