"""The published models of a family as module trees without weights, for code that needs layers but has no pipeline.

Shapes follow diffusers' and transformers' configurations, which are the defaults of most classes. If the models of
a family differ in more than depth, all of them are here, the most common first. Options that only add layers are on.
Building a model takes about a second and no memory, because everything is on the meta device.

Sources for classes with other defaults: in diffusers' `scripts/`, `convert_wan_to_diffusers.py`,
`convert_ltx2_to_diffusers.py`, `convert_hunyuan_image_to_diffusers.py`, `convert_hunyuan_video1_5_to_diffusers.py`,
`convert_stable_cascade.py`, `convert_stable_cascade_lite.py`, `convert_cogview4_to_diffusers.py`,
`convert_pixart_to_diffusers.py`, and `convert_anima_to_diffusers.py` with the Cosmos-2.0-Diffusion-2B-Text2Image of
`convert_cosmos_to_diffusers.py`, which is Anima's transformer; ComfyUI `comfy/model_detection.py` for HiDream.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeAlias

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
_QWEN3_06B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_HIDREAM: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
    "axes_dims_rope": (64, 32, 32),
    "llama_layers": [*range(32), *[31] * 16],
}
_STAGE_C: dict[str, Any] = {
    "clip_text_in_channels": 1280,
    "clip_text_pooled_in_channels": 1280,
    "clip_image_in_channels": 768,
    "switch_level": (False,),
}
_STAGE_C_LITE: dict[str, Any] = {
    **_STAGE_C,
    "conditioning_dim": 1536,
    "block_out_channels": (1536, 1536),
    "num_attention_heads": (24, 24),
    "down_num_layers_per_block": (4, 12),
    "up_num_layers_per_block": (12, 4),
}
_WITH_IMAGE: dict[str, Any] = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
_WAN_SMALL: dict[str, Any] = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
_WAN_5B: dict[str, Any] = {
    "num_attention_heads": 24,
    "num_layers": 30,
    "ffn_dim": 14336,
    "in_channels": 48,
    "out_channels": 48,
}
_VACE: dict[str, Any] = {"vace_in_channels": 96, "vace_layers": list(range(0, 40, 5))}
_LTX23: dict[str, Any] = {
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
}
_LTX23_CONNECTORS: dict[str, Any] = {
    "video_connector_num_attention_heads": 32,
    "video_connector_num_layers": 8,
    "video_gated_attn": True,
    "audio_connector_num_attention_heads": 32,
    "audio_connector_attention_head_dim": 64,
    "audio_connector_num_layers": 8,
    "audio_gated_attn": True,
    "per_modality_projections": True,
    "proj_bias": True,
}


def _diffusers(name: str, module: str = "diffusers", **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(import_module(module), name)(**config)


def _clip(config: Mapping[str, Any], *, projected: bool = False) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        encoder_class = CLIPTextModelWithProjection if projected else CLIPTextModel
        return encoder_class(CLIPTextConfig(**config))

    return build


def _qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    return Qwen3Model(Qwen3Config(**_QWEN3_06B))


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


def _connectors(**config: Any) -> Callable[[], nn.Module]:
    return _diffusers("LTX2TextConnectors", "diffusers.pipelines.ltx2.connectors", **config)


def _wan(name: str = "WanTransformer3DModel", **config: Any) -> "_Models":
    """Return a model of Wan with the second expert of Wan 2.2, which is built like the first."""
    model = _diffusers(name, **config)
    return {"transformer": model, "transformer_2": model}


_Models: TypeAlias = Mapping[str, Callable[[], nn.Module]]
"""Component -> function that builds its model."""

_MODELS: dict[str, tuple[_Models, ...]] = {
    "sd": ({"unet": _diffusers("UNet2DConditionModel", **_SD_UNET), "text_encoder": _clip(_CLIP_L)},),
    "sd2": ({"unet": _diffusers("UNet2DConditionModel", **_SD2_UNET), "text_encoder": _clip(_CLIP_H)},),
    "sdxl": (
        {
            "unet": _diffusers("UNet2DConditionModel", **_SDXL_UNET),
            "text_encoder": _clip(_CLIP_L),
            "text_encoder_2": _clip(_CLIP_G, projected=True),
        },
    ),
    "sd3": (
        {
            "transformer": _diffusers("SD3Transformer2DModel", **_SD3),
            "text_encoder": _clip(_CLIP_L, projected=True),
            "text_encoder_2": _clip(_CLIP_G, projected=True),
            "text_encoder_3": _t5,
        },
    ),
    "cascade": tuple(
        {"prior": _diffusers("StableCascadeUNet", **config), "text_encoder": _clip(_CLIP_G, projected=True)}
        for config in (_STAGE_C, _STAGE_C_LITE)
    ),
    "flux": tuple(
        {
            "transformer": _diffusers(
                "FluxTransformer2DModel", guidance_embeds=True, out_channels=64, in_channels=inputs
            ),
            "text_encoder": _clip(_CLIP_L),
            "text_encoder_2": _t5,
        }
        # The second is FLUX.1 Fill.
        for inputs in (64, 384)
    ),
    "chroma": ({"transformer": _diffusers("ChromaTransformer2DModel"), "text_encoder": _t5},),
    "flux2": ({"transformer": _diffusers("Flux2Transformer2DModel")},),
    "flux3": ({"transformer": _diffusers("Flux3Transformer2DModel")},),
    "minimax-h3": ({"transformer": _diffusers("MiniMaxH3Transformer3DModel")},),
    "ace-step": ({"transformer": _diffusers("AceStepTransformer1DModel")},),
    "qwen": ({"transformer": _diffusers("QwenImageTransformer2DModel")},),
    "qwen21": ({"transformer": _diffusers("QwenImage21Transformer2DModel")},),
    "zimage": ({"transformer": _diffusers("ZImageTransformer2DModel")},),
    "krea2": ({"transformer": _diffusers("Krea2Transformer2DModel")},),
    "anima": (
        {
            "transformer": _diffusers("CosmosTransformer3DModel", num_attention_heads=16, extra_pos_embed_type=None),
            "text_conditioner": _diffusers("AnimaTextConditioner"),
            "text_encoder": _qwen3,
        },
    ),
    "lumina2": ({"transformer": _diffusers("Lumina2Transformer2DModel")},),
    "sana": ({"transformer": _diffusers("SanaTransformer2DModel")},),
    "pixart": (
        {
            "transformer": _diffusers(
                "PixArtTransformer2DModel", caption_channels=4096, use_additional_conditions=True
            ),
            "text_encoder": _t5,
        },
    ),
    "auraflow": ({"transformer": _diffusers("AuraFlowTransformer2DModel")},),
    "hunyuan-video": ({"transformer": _diffusers("HunyuanVideoTransformer3DModel")},),
    "hunyuan-video15": ({"transformer": _diffusers("HunyuanVideo15Transformer3DModel", use_meanflow=True)},),
    "hunyuan-image": (
        {
            "transformer": _diffusers(
                "HunyuanImageTransformer2DModel", text_embed_2_dim=1472, guidance_embeds=True, use_meanflow=True
            )
        },
    ),
    "wan": (
        _wan(),
        _wan(**_WITH_IMAGE),
        _wan(**_WAN_SMALL),
        _wan(**_WAN_5B),
        _wan(in_channels=36),
        _wan("WanVACETransformer3DModel", **_VACE),
        _wan("WanVACETransformer3DModel", **_WAN_SMALL, **{**_VACE, "vace_layers": list(range(0, 30, 2))}),
        {"transformer": _diffusers("HeliosTransformer3DModel")},
    ),
    "ltx": ({"transformer": _diffusers("LTXVideoTransformer3DModel")},),
    "ltx2": (
        {"transformer": _diffusers("LTX2VideoTransformer3DModel"), "connectors": _connectors()},
        {
            "transformer": _diffusers("LTX2VideoTransformer3DModel", **_LTX23),
            "connectors": _connectors(**_LTX23_CONNECTORS),
        },
    ),
    "cogview4": (
        {
            "transformer": _diffusers(
                "CogView4Transformer2DModel", num_layers=28, num_attention_heads=32, attention_head_dim=128
            )
        },
    ),
    "hidream": ({"transformer": _diffusers("HiDreamImageTransformer2DModel", **_HIDREAM)},),
    "ideogram4": ({"transformer": _diffusers("Ideogram4Transformer2DModel")},),
}


def published(family: str) -> Iterator[dict[str, nn.Module]]:
    """Yield the published models of a family one after the other, as component -> model on the meta device.

    Raises:
        AdapterError: no models of the family are known here, or the installed diffusers or transformers does not have
            their classes.
    """
    if family not in _MODELS:
        raise AdapterError(
            f"the layers of {family} models are not known here, those of {', '.join(sorted(_MODELS))} are; "
            "load the file into a pipeline and save it from there"
        )
    for models in _MODELS[family]:
        built: dict[Callable[[], nn.Module], nn.Module] = {}
        try:
            with torch.device("meta"):
                for build in models.values():
                    built[build] = built[build] if build in built else build()
        except (AttributeError, ImportError) as error:
            raise AdapterError(f"the installed diffusers or transformers has no {family} model ({error})") from error
        yield {component: built[build] for component, build in models.items()}
