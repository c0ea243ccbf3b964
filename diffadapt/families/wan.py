"""Wan 2.1 and 2.2 and models built on them: the layout of Alibaba's code.

The `norm3` of the original is `norm2` in diffusers, where `norm3` is another norm, without weights.
Source: diffusers 0.42.1 `loaders/single_file_utils.py`.
"""

from diffadapt.families.family import Family, Table, block

_BLOCK: Table = {
    **{
        f"{theirs}.{name}": f"{ours}.{own}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, own in {
            "q": "to_q",
            "k": "to_k",
            "v": "to_v",
            "o": "to_out.0",
            "norm_q": "norm_q",
            "norm_k": "norm_k",
        }.items()
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_FACE: Table = {
    "linear1_q": "to_q",
    "linear1_kv": ("to_k", "to_v"),
    "linear2": "to_out",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

WAN = Family(
    "wan",
    (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
        "HeliosTransformer3DModel",
    ),
    signs=(
        r"blocks~~(?:self|cross)_attn~(?:norm_)?(?:q|k|v|o|k_img|v_img)\.|blocks~~ffn~"
        r"|(?<!transformer_)(?<!refiner_)(?<!layerwise_)blocks~~attn~(?:to|add)_"
    ),
    layers={
        **block("blocks.{}", "blocks.{}", _BLOCK),
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
        **block("vace_blocks.{}", "vace_blocks.{}", _BLOCK),
        "vace_blocks.{}.before_proj": "vace_blocks.{}.proj_in",
        "vace_blocks.{}.after_proj": "vace_blocks.{}.proj_out",
        **block("face_adapter.fuser_blocks.{}", "face_adapter.{}", _FACE),
        "face_encoder.conv1_local.conv": "face_encoder.conv1_local",
        "face_encoder.conv2.conv": "face_encoder.conv2",
        "face_encoder.conv3.conv": "face_encoder.conv3",
    },
    # Names that old versions of ai-toolkit put together from both layouts.
    also={
        f"{blocks}.{{}}.{theirs}.to_{letter}": f"{blocks}.{{}}.{ours}.to_{letter}"
        for blocks in ("blocks", "vace_blocks")
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for letter in ("q", "k", "v", "out.0")
    },
    # The image-to-video models of Wan 2.1 attend to an encoded image; those of Wan 2.2 and all others do not.
    optional={
        "a layer of the image branch": (
            r"_cross_attn_(?:norm_)?[kv]_img(?:_|$)|(?:^|_)img_emb_proj_|_add_[kv]_proj(?:_|$)|_norm_added_k(?:_|$)"
            r"|(?:^|_)image_embedder_"
        )
    },
)
