"""MiniMax-H3: the layout of MiniMax's code.

Source: diffusers 0.42.1 `loaders/lora_conversion_utils.py`, `_convert_non_diffusers_minimax_h3_lora_to_diffusers`.
"""

from diffadapt.families.family import Family, Table, block, qkv

_BLOCK: Table = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv_proj": qkv("attn.to_"),
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.out_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}

MINIMAX_H3 = Family(
    "minimax-h3",
    ("MiniMaxH3Transformer3DModel",),
    signs=(
        "blocks~~attn~(?:qkv|out)_proj|adaln_proj~linear|audio_patch_proj|final_layer~(?:video|audio)_out"
        "|(?<!context_embedder[._])token_refiner~refiner_blocks|(?<!individual_)token_refiner~blocks~~(?:attn|mlp)~"
    ),
    layers={
        **block("blocks.{}", "transformer_blocks.{}", {**_BLOCK, "adaln_proj.linear": "adaln_proj.linear"}),
        **block("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}", _BLOCK),
        "video_patch_proj": "proj_in",
        "audio_patch_proj": "audio_proj_in",
        "condition_proj": "context_embedder",
        "time_embedder.proj_in": "time_embedder.linear_1",
        "time_embedder.proj_out": "time_embedder.linear_2",
        "final_layer.norm": "norm_out.norm",
        "final_layer.adaln_proj.linear": "norm_out.linear",
        "final_layer.video_out": "proj_out",
        "final_layer.audio_out": "audio_proj_out",
    },
    # The original activates the first half, diffusers the second.
    swapped=frozenset({"blocks.{}.mlp.fc1", "token_refiner.blocks.{}.mlp.fc1"}),
    # DiffSynth-Studio trains on the checkpoint as it is stored, and writes PEFT's names in memory.
    by_head=frozenset({"blocks.{}.attn.qkv_proj", "token_refiner.blocks.{}.attn.qkv_proj"}),
)
