"""Stable Diffusion 3 and 3.5: the layout of Stability's code.

Source: diffusers 0.42.1 `loaders/single_file_utils.py`.
"""

from diffadapt.families.family import Aliases, Family, Table, block, qkv
from diffadapt.families.fused_parts import FusedPart
from diffadapt.runtime.targets import Targets

_IMAGE: Table = {
    "attn.qkv": qkv("attn.to_"),
    "attn.proj": "attn.to_out.0",
    "attn.ln_q": "attn.norm_q",
    "attn.ln_k": "attn.norm_k",
    "attn2.qkv": qkv("attn2.to_"),
    "attn2.proj": "attn2.to_out.0",
    "attn2.ln_q": "attn2.norm_q",
    "attn2.ln_k": "attn2.norm_k",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_TEXT: Table = {
    "attn.qkv": qkv("attn.add_", "_proj"),
    "attn.proj": "attn.to_add_out",
    "attn.ln_q": "attn.norm_added_q",
    "attn.ln_k": "attn.norm_added_k",
    "mlp.fc1": "ff_context.net.0.proj",
    "mlp.fc2": "ff_context.net.2",
    "adaLN_modulation.1": "norm1_context.linear",
}


def _last_text_norm(targets: Targets) -> Aliases:
    """Return the name of the text's norm in the last block that reads text.

    It consists of two halves there, which diffusers has in the opposite order.
    """
    found: dict[str, tuple[FusedPart, ...]] = {}
    for path in targets.modules:
        start, end, rest = path.partition(".norm1_context.linear")
        if end and not rest and f"{start}.ff_context" not in targets.modules:
            number = start.removeprefix("transformer_blocks.")
            found[f"joint_blocks.{number}.context_block.adaLN_modulation.1"] = (FusedPart(path, swapped=True),)
    return found


SD3 = Family(
    "sd3",
    ("SD3Transformer2DModel",),
    signs="joint_blocks~~",
    layers={
        **block("joint_blocks.{}.x_block", "transformer_blocks.{}", _IMAGE),
        **block("joint_blocks.{}.context_block", "transformer_blocks.{}", _TEXT),
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    aliases=_last_text_norm,
)
