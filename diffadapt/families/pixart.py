"""PixArt and Sana: the layout of PixArt's code.

Sources: diffusers 0.42.1 `loaders/single_file_utils.py` and its conversion scripts for PixArt and Sana 1.5.
"""

from diffadapt.families.family import Family, Table, block, qkv

_BLOCK: Table = {
    "attn.qkv": qkv("attn1.to_"),
    "attn.proj": "attn1.to_out.0",
    "attn.q_norm": "attn1.norm_q",
    "attn.k_norm": "attn1.norm_k",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": "attn2.to_out.0",
    "cross_attn.q_norm": "attn2.norm_q",
    "cross_attn.k_norm": "attn2.norm_k",
}
_ENDS: Table = {
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}

PIXART = Family(
    "pixart",
    ("PixArtTransformer2DModel",),
    signs="(?:csize|ar)_embedder~mlp",
    layers={
        **block("blocks.{}", "transformer_blocks.{}", {**_BLOCK, "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}),
        **_ENDS,
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    },
)

SANA = Family(
    "sana",
    ("SanaTransformer2DModel",),
    signs="mlp~(?:inverted|depth|point)_conv|ff~conv_(?:inverted|depth|point)",
    # Not `layers`: trainers write the names of diffusers.
    also={
        **block(
            "blocks.{}",
            "transformer_blocks.{}",
            {
                **_BLOCK,
                "mlp.inverted_conv.conv": "ff.conv_inverted",
                "mlp.depth_conv.conv": "ff.conv_depth",
                "mlp.point_conv.conv": "ff.conv_point",
            },
        ),
        **_ENDS,
        "x_embedder.proj": "patch_embed.proj",
        "t_embedder.mlp.0": "time_embed.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_embed.emb.timestep_embedder.linear_2",
        "t_block.1": "time_embed.linear",
        "attention_y_norm": "caption_norm",
    },
)
