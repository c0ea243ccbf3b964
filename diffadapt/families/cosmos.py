"""Anima, a text-to-image model on the transformer of Cosmos-Predict2: the layout of NVIDIA's code.

Source: diffusers 0.42.1 `loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`.
"""

from diffadapt.families.family import Aliases, Family, Table, block, weighted
from diffadapt.families.fused_parts import FusedPart
from diffadapt.runtime.targets import Targets

_BLOCK: Table = {
    **{
        f"{theirs}.{name}": f"{ours}.{own}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, own in {
            "q_proj": "to_q",
            "k_proj": "to_k",
            "v_proj": "to_v",
            "output_proj": "to_out.0",
            "q_norm": "norm_q",
            "k_norm": "norm_k",
        }.items()
    },
    "mlp.layer1": "ff.net.0.proj",
    "mlp.layer2": "ff.net.2",
    **{
        f"adaln_modulation_{module}.{layer}": f"norm{number}.linear_{layer}"
        for number, module in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for layer in (1, 2)
    },
}

ANIMA = Family(
    "anima",
    ("CosmosTransformer3DModel",),
    signs=(
        r"(?<!encoder_)blocks~~(?:self|cross)_attn~(?:q|k|v|output)_proj|adaln_modulation_(?:self|cross|mlp)"
        r"|llm_adapter|transformer_blocks~~norm~linear_\."
    ),
    layers={
        **block("blocks.{}", "transformer_blocks.{}", _BLOCK),
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        "final_layer.linear": "proj_out",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
    },
)


def _conditioner(targets: Targets) -> Aliases:
    return {f"llm_adapter.{path}": (FusedPart(path),) for path in weighted(targets)}


ANIMA_CONDITIONER = Family("anima", ("AnimaTextConditioner",), aliases=_conditioner)
