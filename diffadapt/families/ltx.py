"""LTX-Video and LTX-2: the layout of Lightricks' code, in which blocks have the same names as in diffusers.

Sources: diffusers 0.42.1 `loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`; for the connectors
diffusers' `scripts/convert_ltx2_to_diffusers.py`.
"""

from diffadapt.families.family import Family, Table

_EMBEDDER = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")


def _norms(*attentions: str) -> Table:
    return {
        f"transformer_blocks.{{}}.{attention}.{letter}_norm": f"transformer_blocks.{{}}.{attention}.norm_{letter}"
        for attention in attentions
        for letter in "qk"
    }


def _embedders(**names: str) -> Table:
    return {f"{theirs}.{layer}": f"{ours}.{layer}" for theirs, ours in names.items() for layer in _EMBEDDER}


LTX = Family(
    "ltx",
    ("LTXVideoTransformer3DModel",),
    signs="patchify_proj",
    layers={
        "patchify_proj": "proj_in",
        **_embedders(adaln_single="time_embed"),
        **_norms("attn1", "attn2"),
    },
)

_SHARED: Table = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    **_embedders(
        adaln_single="time_embed",
        audio_adaln_single="audio_time_embed",
        prompt_adaln_single="prompt_adaln",
        audio_prompt_adaln_single="audio_prompt_adaln",
        av_ca_video_scale_shift_adaln_single="av_cross_attn_video_scale_shift",
        av_ca_audio_scale_shift_adaln_single="av_cross_attn_audio_scale_shift",
        av_ca_a2v_gate_adaln_single="av_cross_attn_video_a2v_gate",
        av_ca_v2a_gate_adaln_single="av_cross_attn_audio_v2a_gate",
    ),
    **_norms("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
}
_CONNECTORS: Table = {
    "text_embedding_projection.aggregate_embed": "text_proj_in",
    "text_embedding_projection.video_aggregate_embed": "video_text_proj_in",
    "text_embedding_projection.audio_aggregate_embed": "audio_text_proj_in",
    **{
        f"{medium}_embeddings_connector.transformer_1d_blocks.{{}}.{theirs}": (
            f"{medium}_connector.transformer_blocks.{{}}.{ours}"
        )
        for medium in ("video", "audio")
        for theirs, ours in {
            **{f"attn1.{name}": f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")},
            "attn1.q_norm": "attn1.norm_q",
            "attn1.k_norm": "attn1.norm_k",
            "ff.net.0.proj": "ff.net.0.proj",
            "ff.net.2": "ff.net.2",
        }.items()
    },
}

LTX2 = Family(
    "ltx2",
    ("LTX2VideoTransformer3DModel", "LTX2TextConnectors"),
    signs="audio_attn|audio_ff|audio_to_video|video_to_audio|av_ca_|av_cross_attn|audio_patchify|_embeddings_connector"
    "|text_embedding_projection",
    layers={**_SHARED, **_CONNECTORS},
)
