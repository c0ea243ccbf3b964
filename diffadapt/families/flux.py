"""Flux.1, Chroma, Flux.2 and Flux.3: the layout of Black Forest Labs' code, which most trainers write.

Sources: diffusers 0.42.1 `loaders/single_file_utils.py`, kohya-ss/sd-scripts 48d368f `networks/convert_flux_lora.py`;
for the numbered parts of fused layers OneTrainer 23df383; for Flux.3 `loaders/lora_conversion_utils.py` of diffusers.
"""

from diffadapt.families.family import Family, Table, block, qkv

_ATTENTION: Table = {
    "img_attn.qkv": qkv("attn.to_"),
    "img_attn.proj": "attn.to_out.0",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.qkv": qkv("attn.add_", "_proj"),
    "txt_attn.proj": "attn.to_add_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS: Table = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_ENDS: Table = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}

_DOUBLE_1: Table = {
    **_ATTENTION,
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "img_mod.lin": "norm1.linear",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "txt_mod.lin": "norm1_context.linear",
}
_SINGLE_1: Table = {
    **_SINGLE_NORMS,
    "linear1": (*qkv("attn.to_"), "proj_mlp"),
    "linear2": "proj_out",
    "modulation.lin": "norm.linear",
}
_BLOCKS_1: Table = {
    **block("double_blocks.{}", "transformer_blocks.{}", _DOUBLE_1),
    **block("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE_1),
    **_ENDS,
}
_NUMBERED_PARTS_1: Table = {
    f"{original}.{position}": name
    for original, names in _BLOCKS_1.items()
    if not isinstance(names, str)
    for position, name in enumerate(names)
}

GUIDANCE = {"a layer of the guidance embedder": r"(?:^|_)guidance_(?:in|embedder)_"}

FLUX = Family(
    "flux",
    ("FluxTransformer2DModel",),
    signs=r"(?:double|single)_blocks~~(?:processor|img_mod~lin\.|txt_mod~lin\.|modulation~lin\.)",
    layers={
        **_BLOCKS_1,
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    also=_NUMBERED_PARTS_1,
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    optional=GUIDANCE,
)

CHROMA = Family(
    "chroma",
    ("ChromaTransformer2DModel",),
    signs="distilled_guidance_layer",
    layers={
        **_BLOCKS_1,
        "distilled_guidance_layer.layers.{}.in_layer": "distilled_guidance_layer.layers.{}.linear_1",
        "distilled_guidance_layer.layers.{}.out_layer": "distilled_guidance_layer.layers.{}.linear_2",
    },
    also=_NUMBERED_PARTS_1,
)

_DOUBLE_2: Table = {
    **_ATTENTION,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE_2: Table = {**_SINGLE_NORMS, "linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}

FLUX2 = Family(
    "flux2",
    ("Flux2Transformer2DModel",),
    signs=(
        r"(?:double|single)_stream_modulation|to_qkv_mlp_proj|single_transformer_blocks~~attn~to_out\.[a-z]"
        r"|transformer_blocks~~ff(?:_context)?~linear_(?:in|out)"
    ),
    layers={
        **block("double_blocks.{}", "transformer_blocks.{}", _DOUBLE_2),
        **block("single_blocks.{}", "single_transformer_blocks.{}", _SINGLE_2),
        **_ENDS,
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    optional=GUIDANCE,
)

_BLOCK_3: Table = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}

FLUX3 = Family(
    "flux3",
    ("Flux3Transformer2DModel",),
    signs=(
        "mode_blocks~|stream_modulations~|x_embedders~|single_transformer_blocks~~ff~linear_(?:in|out)"
        "|single_blocks~~(?:[qkv]_proj|attn_out|mlp_(?:in|out))"
    ),
    layers={
        **block("content_mode_blocks.image.{}", "mode_blocks.image.{}", _BLOCK_3),
        **block("content_mode_blocks.image_cond.{}", "mode_blocks.image_cond.{}", _BLOCK_3),
        **block("txt_mode_blocks.{}", "txt_mode_blocks.{}", _BLOCK_3),
        **block("single_blocks.{}", "single_transformer_blocks.{}", _BLOCK_3),
    },
)
