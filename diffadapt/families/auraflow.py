"""AuraFlow: the layout of fal's code.

Source: diffusers 0.42.1 `loaders/single_file_utils.py`.
"""

from diffadapt.families.family import Family, Table, block

_MLP: Table = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

_DOUBLE: Table = {
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
    **block("mlpX", "ff", _MLP),
    **block("mlpC", "ff_context", _MLP),
}
_SINGLE: Table = {
    "modCX.1": "norm1.linear",
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
    **block("mlp", "ff", _MLP),
}

AURAFLOW = Family(
    "auraflow",
    ("AuraFlowTransformer2DModel",),
    signs="joint_transformer_blocks~~|single_transformer_blocks~~ff~|(?:double|single)_layers~~(?:attn|mlp|mod)",
    layers={
        **block("double_layers.{}", "joint_transformer_blocks.{}", _DOUBLE),
        **block("single_layers.{}", "single_transformer_blocks.{}", _SINGLE),
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "modF.1": "norm_out.linear",
        "final_linear": "proj_out",
    },
    swapped=frozenset({"modF.1"}),
)
