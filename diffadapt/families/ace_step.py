"""ACE-Step 1.5: the layout of its own code, where the denoiser is called `decoder`.

Sources: diffusers 0.42.1 `loaders/lora_conversion_utils.py`, `_convert_non_diffusers_ace_step_lora_to_diffusers`;
ComfyUI `comfy/lora.py` for the name of the decoder.
"""

from diffadapt.families.family import Family, Table, block

_LAYER: Table = {
    f"{attention}.{theirs}": f"{attention}.{ours}"
    for attention in ("self_attn", "cross_attn")
    for theirs, ours in {
        "q_proj": "to_q",
        "k_proj": "to_k",
        "v_proj": "to_v",
        "o_proj": "to_out.0",
        "q_norm": "norm_q",
        "k_norm": "norm_k",
    }.items()
}
_SAME = (
    "self_attn_norm",
    "cross_attn_norm",
    "mlp_norm",
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)

ACE_STEP = Family(
    "ace-step",
    ("AceStepTransformer1DModel",),
    signs="layers~~cross_attn~(?:[qkvo]_proj|to_)",
    layers=block("layers.{}", "layers.{}", _LAYER),
    also={
        **block("decoder.layers.{}", "layers.{}", {**_LAYER, **{name: name for name in _SAME}}),
        "decoder.condition_embedder": "condition_embedder",
    },
)
