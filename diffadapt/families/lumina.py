"""Lumina 2, Z-Image and Ideogram 4, which have similar architectures.

Sources: diffusers 0.42.1 `loaders/single_file_utils.py` and, for Ideogram 4, `loaders/lora_conversion_utils.py`.
"""

from diffadapt.families.family import Family, Table, block, qkv

_BLOCKS = ("layers", "noise_refiner", "context_refiner")


def _in_all(blocks: tuple[str, ...], layers: Table) -> Table:
    return {name: ours for own in blocks for name, ours in block(f"{own}.{{}}", f"{own}.{{}}", layers).items()}


_LUMINA: Table = {
    "attention.qkv": qkv("attn.to_"),
    "attention.out": "attn.to_out.0",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
    "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3",
    "attention_norm2": "norm2",
}
_MODULATED: Table = {"attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}

LUMINA2 = Family(
    "lumina2",
    ("Lumina2Transformer2DModel",),
    signs=r"(?:layers|_refiner)~~(?:attn~(?:to|norm)_|feed_forward~linear_)|time_caption_embed",
    layers={
        **_in_all(_BLOCKS, _LUMINA),
        **block("layers.{}", "layers.{}", _MODULATED),
        **block("noise_refiner.{}", "noise_refiner.{}", _MODULATED),
        "context_refiner.{}.attention_norm1": "context_refiner.{}.norm1",
        "t_embedder.mlp.0": "time_caption_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_caption_embed.timestep_embedder.linear_2",
        "cap_embedder.0": "time_caption_embed.caption_embedder.0",
        "cap_embedder.1": "time_caption_embed.caption_embedder.1",
        "final_layer.linear": "norm_out.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    },
)

_ZIMAGE: Table = {
    "attention.qkv": qkv("attention.to_"),
    "attention.out": "attention.to_out.0",
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
}

ZIMAGE = Family(
    "zimage",
    ("ZImageTransformer2DModel",),
    signs="all_final_layer|all_x_embedder|siglip_",
    layers={
        **_in_all((*_BLOCKS, "siglip_refiner"), _ZIMAGE),
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    },
)

IDEOGRAM4 = Family(
    "ideogram4",
    ("Ideogram4Transformer2DModel",),
    signs=r"layers~~(?:attention~o\.|adaln_modulation)|llm_cond_",
    layers={
        "layers.{}.attention.qkv": qkv("layers.{}.attention.to_"),
        "layers.{}.attention.o": "layers.{}.attention.to_out.0",
    },
)
