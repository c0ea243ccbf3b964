"""A small denoiser of every family, built from its own class: one block of each kind, few channels, random weights.

Sizes are multiples of 8, so that rotation blocks fit every layer. They differ between layers as in published models,
so that a tensor of another layer does not fit by accident.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.support import models
from tests.support.silence import ignored
from tests.support.versions import diffusers

_SQUARE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Small:
    """The small models of one family.

    Attributes:
        pipeline: The class in diffusers with which people load adapters of this family.
        components: How each component is built; the denoiser comes first.
        tall: How a denoiser with as many outputs as the published one is built, if diffusers' converter expects that.
    """

    pipeline: str
    components: Mapping[str, Callable[[], nn.Module]]
    tall: Callable[[], nn.Module] | None = None

    def build(self, tall: bool = False) -> dict[str, nn.Module]:
        """Return the models by component, always with the same weights, none of which are zero."""
        torch.manual_seed(0)
        makers = dict(self.components)
        if tall and self.tall is not None:
            makers[next(iter(makers))] = self.tall
        with ignored(FutureWarning):
            built = {name: make().eval().requires_grad_(False) for name, make in makers.items()}
        for model in built.values():
            for parameter in model.parameters():
                if parameter.ndim and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return built


def _denoiser(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(diffusers, name)(**config)


def _transformer(pipeline: str, name: str, tall: Callable[[], nn.Module] | None = None, **config: Any) -> Small:
    return Small(pipeline, {"transformer": _denoiser(name, **config)}, tall)


def _tall(name: str, part: int = 64, **config: Any) -> Callable[[], nn.Module]:
    """Return a function that builds a model whose linear layers have all outputs and 1 / `part` of the inputs.

    The model cannot run as a whole.
    """

    def build() -> nn.Module:
        with torch.device("meta"):
            model = getattr(diffusers, name)(**config)
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                inputs = max(8, module.in_features // part)
                model.set_submodule(
                    path, nn.Linear(inputs, module.out_features, bias="bias" in dict(module.named_parameters()))
                )
        for parameter in model.to_empty(device="cpu").parameters():
            nn.init.normal_(parameter, std=0.1)
        return model

    return build


def _unet(**config: Any) -> Callable[[], nn.Module]:
    """Return a function that builds the UNet of SD 1 or 2 with two of its four levels."""
    return _denoiser(
        "UNet2DConditionModel",
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        norm_num_groups=4,
        **config,
    )


def _clip() -> nn.Module:
    return models.clip_text(layers=1)


def _clip_with_projection() -> nn.Module:
    return CLIPTextModelWithProjection(models.clip_text_config(layers=1))


def _t5() -> nn.Module:
    config = T5Config(
        vocab_size=32, d_model=64, d_kv=8, d_ff=48, num_layers=1, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return T5EncoderModel(config)


_ONE_OF_BOTH: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1}
_LIKE_FLUX: dict[str, Any] = {
    **_ONE_OF_BOTH,
    **_SQUARE,
    "in_channels": 16,
    "joint_attention_dim": 64,
    "axes_dims_rope": (4, 4, 8),
}
_FLUX = _LIKE_FLUX | {"pooled_projection_dim": 48, "guidance_embeds": True}


SMALL: dict[str, Small] = {
    "sd": Small("StableDiffusionPipeline", {"unet": _unet(cross_attention_dim=32), "text_encoder": _clip}),
    "sd2": Small(
        "StableDiffusionPipeline",
        # The width of the text identifies the UNet of SD 2.
        {"unet": _unet(cross_attention_dim=1024, use_linear_projection=True), "text_encoder": _clip},
    ),
    "sdxl": Small(
        "StableDiffusionXLPipeline",
        {
            "unet": _denoiser(
                "UNet2DConditionModel",
                sample_size=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16, 16),
                layers_per_block=1,
                transformer_layers_per_block=(1, 1, 1),
                cross_attention_dim=64,
                attention_head_dim=(1, 2, 2),
                norm_num_groups=4,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=80,
            ),
            "text_encoder": _clip,
            "text_encoder_2": _clip_with_projection,
        },
    ),
    "sd3": Small(
        "StableDiffusion3Pipeline",
        {
            "transformer": _denoiser(
                "SD3Transformer2DModel",
                sample_size=8,
                in_channels=8,
                out_channels=8,
                # The last block is built differently.
                num_layers=2,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=64,
                pos_embed_max_size=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
                **_SQUARE,
            ),
            "text_encoder": _clip_with_projection,
            "text_encoder_2": _clip_with_projection,
            "text_encoder_3": _t5,
        },
    ),
    "flux": Small(
        "FluxPipeline",
        {
            "transformer": _denoiser("FluxTransformer2DModel", **_FLUX),
            "text_encoder": _clip,
            "text_encoder_2": _t5,
        },
        tall=_tall("FluxTransformer2DModel", guidance_embeds=True, **_ONE_OF_BOTH),
    ),
    "flux control": Small(
        "FluxControlPipeline",
        {"transformer": _denoiser("FluxTransformer2DModel", **_FLUX | {"in_channels": 32, "out_channels": 16})},
        # Its converter expects all blocks.
        tall=_tall("FluxTransformer2DModel", 384, in_channels=128, out_channels=64, guidance_embeds=True),
    ),
    "chroma": _transformer(
        "ChromaPipeline",
        "ChromaTransformer2DModel",
        tall=_tall("ChromaTransformer2DModel", **_ONE_OF_BOTH),
        approximator_num_channels=16,
        approximator_hidden_dim=48,
        approximator_layers=2,
        **_LIKE_FLUX,
    ),
    "flux2": _transformer(
        "Flux2Pipeline",
        "Flux2Transformer2DModel",
        timestep_guidance_channels=16,
        **_LIKE_FLUX | {"axes_dims_rope": (4, 4, 4, 4)},
    ),
    "flux3": _transformer(
        "Flux3ModularPipeline",
        "Flux3Transformer2DModel",
        cond_in_channels=24,
        timestep_channels=16,
        **_LIKE_FLUX | {"axes_dims_rope": (4, 4, 4, 4)},
    ),
    "minimax-h3": _transformer(
        "MiniMaxH3ModularPipeline",
        "MiniMaxH3Transformer3DModel",
        hidden_size=48,
        num_layers=1,
        num_refiner_layers=1,
        ffn_dim=64,
        in_channels=4,
        audio_in_channels=24,
        text_dim=40,
        freq_dim=16,
        time_embed_hidden_dim=56,
        time_embed_dim=32,
        rope_freq_dim=2,
        **_SQUARE,
    ),
    "ace-step": _transformer(
        "AceStepPipeline",
        "AceStepTransformer1DModel",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
    ),
    "auraflow": _transformer(
        "AuraFlowPipeline",
        "AuraFlowTransformer2DModel",
        sample_size=8,
        in_channels=8,
        out_channels=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pos_embed_max_size=16,
        **_SQUARE,
    ),
    "qwen": _transformer(
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=1,
        joint_attention_dim=64,
        axes_dims_rope=(4, 4, 8),
        **_SQUARE,
    ),
    "qwen21": _transformer(
        "QwenImage21Pipeline",
        "QwenImage21Transformer2DModel",
        in_channels=16,
        out_channels=16,
        num_layers=1,
        context_in_dim=64,
        axes_dims_rope=(4, 4, 8),
        **_SQUARE,
    ),
    "krea2": _transformer(
        "Krea2Pipeline",
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=48,
        num_text_layers=2,
        text_num_attention_heads=3,
        text_num_key_value_heads=3,
        text_intermediate_size=80,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    ),
    "anima": Small(
        "AnimaModularPipeline",
        {
            "transformer": _denoiser(
                "CosmosTransformer3DModel",
                in_channels=8,
                out_channels=8,
                num_layers=1,
                text_embed_dim=64,
                adaln_lora_dim=16,
                max_size=(2, 8, 8),
                extra_pos_embed_type=None,
                concat_padding_mask=False,
                **_SQUARE,
            ),
            "text_conditioner": _denoiser(
                "AnimaTextConditioner",
                source_dim=48,
                target_dim=64,
                model_dim=32,
                num_layers=1,
                num_attention_heads=2,
                target_vocab_size=32,
            ),
        },
    ),
    "wan": _transformer(
        "WanPipeline",
        "WanTransformer3DModel",
        in_channels=8,
        out_channels=8,
        text_dim=64,
        freq_dim=16,
        ffn_dim=48,
        num_layers=1,
        image_dim=40,
        added_kv_proj_dim=32,
        rope_max_seq_len=32,
        **_SQUARE,
    ),
    "ltx": _transformer(
        "LTXPipeline",
        "LTXVideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=64,
        **_SQUARE,
    ),
    "ltx2": _transformer(
        "LTX2Pipeline",
        "LTX2VideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        cross_attention_dim=32,
        audio_in_channels=24,
        audio_out_channels=24,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=64,
        **_SQUARE,
    ),
    "hunyuan-video": _transformer(
        "HunyuanVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        tall=_tall("HunyuanVideoTransformer3DModel", **_ONE_OF_BOTH),
        in_channels=8,
        out_channels=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=48,
        rope_axes_dim=(4, 4, 8),
        **_SQUARE,
    ),
    "hunyuan-video15": _transformer(
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15Transformer3DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        text_embed_2_dim=48,
        image_embed_dim=40,
        rope_axes_dim=(4, 4, 8),
        **_SQUARE,
    ),
    "hunyuan-image": _transformer(
        "HunyuanImagePipeline",
        "HunyuanImageTransformer2DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        text_embed_2_dim=48,
        guidance_embeds=True,
        rope_axes_dim=(8, 8),
        **_SQUARE,
    ),
    "lumina2": _transformer(
        "Lumina2Pipeline",
        "Lumina2Transformer2DModel",
        tall=_tall("Lumina2Transformer2DModel", num_layers=1, num_refiner_layers=1),
        sample_size=8,
        in_channels=8,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(16, 16, 16),
        cap_feat_dim=64,
    ),
    "ideogram4": _transformer(
        "Ideogram4Pipeline",
        "Ideogram4Transformer2DModel",
        in_channels=16,
        num_layers=1,
        intermediate_size=48,
        adaln_dim=24,
        llm_features_dim=64,
        mrope_section=(4, 2, 2),
        **_SQUARE,
    ),
    "zimage": _transformer(
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        in_channels=8,
        dim=48,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=64,
        axes_dims=[4, 4, 8],
        axes_lens=[40, 16, 16],
    ),
    "sana": _transformer(
        "SanaPipeline",
        "SanaTransformer2DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=64,
        sample_size=8,
        **_SQUARE,
    ),
    "pixart": _transformer(
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        in_channels=8,
        out_channels=16,
        num_layers=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        sample_size=8,
        caption_channels=64,
        use_additional_conditions=False,
        **_SQUARE,
    ),
    "cogview4": _transformer(
        "CogView4Pipeline",
        "CogView4Transformer2DModel",
        in_channels=8,
        out_channels=8,
        num_layers=1,
        text_embed_dim=64,
        time_embed_dim=48,
        condition_dim=16,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(8, 8),
        **_SQUARE,
    ),
    "hidream": _transformer(
        "HiDreamImagePipeline",
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[64, 64],
        text_emb_dim=48,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(16, 16),
        llama_layers=[0, 1],
        **_SQUARE,
    ),
    "cascade": Small(
        "StableCascadePriorPipeline",
        {
            "prior": _denoiser(
                "StableCascadeUNet",
                in_channels=8,
                out_channels=8,
                conditioning_dim=32,
                block_out_channels=(16, 32),
                num_attention_heads=(2, 2),
                down_num_layers_per_block=(1, 1),
                up_num_layers_per_block=(1, 1),
                clip_text_in_channels=64,
                clip_text_pooled_in_channels=64,
                clip_image_in_channels=48,
            )
        },
    ),
}
