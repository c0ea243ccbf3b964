"""The published models of a family as trees without weights, for what needs their layers but has no pipeline.

Shapes are those of diffusers' and transformers' configurations of the first published model of each family; others
of the family differ in depth at most, or are named. Building one takes about a second and no memory: everything is
on the meta device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from diffadapt.errors import AdapterError

_SD_UNET: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
_SD2_UNET: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
_SDXL_UNET: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}
_SD3: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
_CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def _diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import diffusers

        return getattr(diffusers, name)(**config)

    return build


def _clip(config: Mapping[str, Any], *, projected: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        kind = CLIPTextModelWithProjection if projected else CLIPTextModel
        return kind(CLIPTextConfig(**config))

    return build


def _t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


_MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "sd": {"unet": _diffusers("UNet2DConditionModel", **_SD_UNET), "text_encoder": _clip(_CLIP_L)},
    "sd2": {"unet": _diffusers("UNet2DConditionModel", **_SD2_UNET), "text_encoder": _clip(_CLIP_H)},
    "sdxl": {
        "unet": _diffusers("UNet2DConditionModel", **_SDXL_UNET),
        "text_encoder": _clip(_CLIP_L),
        "text_encoder_2": _clip(_CLIP_G, projected=True),
    },
    "sd3": {
        "transformer": _diffusers("SD3Transformer2DModel", **_SD3),
        "text_encoder": _clip(_CLIP_L, projected=True),
        "text_encoder_2": _clip(_CLIP_G, projected=True),
        "text_encoder_3": _t5,
    },
    "flux": {
        "transformer": _diffusers("FluxTransformer2DModel", guidance_embeds=True),
        "text_encoder": _clip(_CLIP_L),
        "text_encoder_2": _t5,
    },
    "chroma": {"transformer": _diffusers("ChromaTransformer2DModel"), "text_encoder": _t5},
    "flux2": {"transformer": _diffusers("Flux2Transformer2DModel")},
    "qwen": {"transformer": _diffusers("QwenImageTransformer2DModel")},
    "zimage": {"transformer": _diffusers("ZImageTransformer2DModel")},
    "krea2": {"transformer": _diffusers("Krea2Transformer2DModel")},
    "lumina2": {"transformer": _diffusers("Lumina2Transformer2DModel")},
    "sana": {"transformer": _diffusers("SanaTransformer2DModel")},
    "pixart": {"transformer": _diffusers("PixArtTransformer2DModel"), "text_encoder": _t5},
    "auraflow": {"transformer": _diffusers("AuraFlowTransformer2DModel")},
    "hunyuan-video": {"transformer": _diffusers("HunyuanVideoTransformer3DModel")},
    "wan": {"transformer": _diffusers("WanTransformer3DModel")},
    "ltx": {"transformer": _diffusers("LTXVideoTransformer3DModel")},
    "ltx2": {"transformer": _diffusers("LTX2VideoTransformer3DModel")},
    "cogview4": {"transformer": _diffusers("CogView4Transformer2DModel")},
    "ideogram4": {"transformer": _diffusers("Ideogram4Transformer2DModel")},
}


def models_of(family: str) -> dict[str, nn.Module]:
    """component -> model on the meta device.

    Raises:
        AdapterError: the family has none here, or the installed diffusers does not know it yet.
    """
    if family not in _MODELS:
        raise AdapterError(
            f"the layers of {family} models are not known here; load the file into a pipeline and save it from there"
        )
    found: dict[str, nn.Module] = {}
    for component, build in _MODELS[family].items():
        try:
            with torch.device("meta"):
                found[component] = build()
        except AttributeError as error:
            raise AdapterError(f"the installed diffusers has no {family} model ({error})") from error
    return found
