"""A whole pipeline of every family that can be trained: real classes, few channels, random weights, nothing downloaded.

Nothing has to be set on them after they were loaded from a folder. Only the processors of Qwen-Image Edit and 2.1
cannot be saved.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from tests.support import tiny_parts as parts
from tests.support.silence import ignored
from tests.support.tiny_tokenizers import TinyProcessor, tokenizer
from tests.support.versions import diffusers, needs

_SQUARE: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16}


def _unet(**config: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **config,
    )


def _sd(prediction: str = "epsilon") -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=parts.vae(),
        text_encoder=parts.clip(),
        tokenizer=parts.clip_tokenizer(),
        unet=_unet(cross_attention_dim=parts.WIDTH),
        scheduler=parts.ddim(prediction_type=prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=parts.vae(scaling_factor=0.13025),
        text_encoder=parts.clip(),
        text_encoder_2=parts.clip(projection=True),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * parts.WIDTH,
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + parts.WIDTH,
        ),
        scheduler=parts.ddim(),
        add_watermarker=False,
    )


def _sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=2 * parts.WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * parts.WIDTH,
            pos_embed_max_size=16,
            **_SQUARE,
        ),
        scheduler=parts.flow(shift=3.0),
        vae=parts.shifted_vae(),
        text_encoder=parts.clip(True),
        text_encoder_2=parts.clip(True),
        text_encoder_3=parts.t5(2 * parts.WIDTH),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        tokenizer_3=parts.t5_tokenizer(),
    )


_LIKE_FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": parts.WIDTH,
    "axes_dims_rope": (4, 4, 8),
    **_SQUARE,
}


def _flux(kind: str = "FluxPipeline", **config: Any) -> Any:
    config = {"guidance_embeds": True, "pooled_projection_dim": parts.WIDTH} | config
    return getattr(diffusers, kind)(
        scheduler=parts.dynamic(shift=3.0),
        vae=parts.shifted_vae(),
        text_encoder=parts.clip(),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.t5_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(**_LIKE_FLUX | config),
    )


def _schnell() -> Any:
    pipe = _flux(guidance_embeds=False)
    pipe.register_modules(scheduler=parts.flow(shift=1.0))
    return pipe


def _chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=parts.flow(),
        vae=parts.shifted_vae(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=diffusers.ChromaTransformer2DModel(
            approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1, **_LIKE_FLUX
        ),
    )


def _flux2() -> Any:
    return _like_flux2("Flux2Pipeline", parts.mistral3(), True)


def _flux2_klein() -> Any:
    return _like_flux2("Flux2KleinPipeline", parts.llm("Qwen3ForCausalLM", "Qwen3Config", 27), False)


def _like_flux2(kind: str, encoder: nn.Module, guidance: bool) -> Any:
    return getattr(diffusers, kind)(
        scheduler=parts.dynamic(shift=3.0),
        vae=parts.flux2_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer(),
        transformer=diffusers.Flux2Transformer2DModel(
            patch_size=1,
            timestep_guidance_channels=16,
            guidance_embeds=guidance,
            **_LIKE_FLUX | {"joint_attention_dim": 48, "axes_dims_rope": (4, 4, 4, 4)},
        ),
    )


def _qwen(kind: str = "QwenImagePipeline", **further: Any) -> Any:
    return getattr(diffusers, kind)(
        scheduler=parts.dynamic(max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02),
        vae=parts.frame_vae(),
        text_encoder=parts.qwen25_vl(),
        tokenizer=tokenizer(1024),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), **_SQUARE
        ),
        **further,
    )


def _qwen21() -> Any:
    return diffusers.QwenImage21Pipeline(
        scheduler=parts.dynamic(),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=8,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1 * (n + 1) for n in range(8)],
            latents_std=[1 + 0.1 * n for n in range(8)],
        ),
        text_encoder=parts.qwen3_vl("Qwen3VLForConditionalGeneration"),
        processor=TinyProcessor(16, 2048 * 2048),
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=8, out_channels=8, num_layers=1, context_in_dim=16, axes_dims_rope=(4, 4, 8), **_SQUARE
        ),
    )


def _zimage() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=parts.flow(shift=6.0),
        vae=parts.shifted_vae(),
        text_encoder=parts.llm("Qwen3Model", "Qwen3Config"),
        tokenizer=tokenizer(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[640, 32, 32],
        ),
    )


def _krea2() -> Any:
    return diffusers.Krea2Pipeline(
        scheduler=parts.dynamic(max_image_seq_len=6400),
        vae=parts.frame_vae(),
        text_encoder=parts.qwen3_vl(),
        tokenizer=tokenizer(1024),
        transformer=diffusers.Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=3,
            text_num_attention_heads=1,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 8),
        ),
        text_encoder_select_layers=(1, 2, 3),
    )


def _lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        scheduler=parts.flow(shift=6.0),
        vae=parts.shifted_vae(),
        text_encoder=parts.llm("Gemma2Model", "Gemma2Config"),
        tokenizer=tokenizer(adds="<bos> $A"),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 4, 8),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
    )


def _sana() -> Any:
    blocks = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock")
    return diffusers.SanaPipeline(
        scheduler=parts.flow(shift=3.0),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            encoder_qkv_multiscales=((), (5,), (5,)),
            decoder_qkv_multiscales=((), (5,), (5,)),
            upsample_block_type="interpolate",
            downsample_block_type="conv",
            scaling_factor=0.41407,
        ),
        text_encoder=parts.llm("Gemma2Model", "Gemma2Config"),
        tokenizer=tokenizer(1024, "<bos> $A"),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            sample_size=8,
            **_SQUARE,
        ),
    )


def _pixart(kind: str, sample_size: int) -> Any:
    return getattr(diffusers, kind)(
        scheduler=diffusers.DPMSolverMultistepScheduler(solver_order=1),
        vae=parts.vae(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=diffusers.PixArtTransformer2DModel(
            in_channels=4,
            out_channels=8,
            num_layers=1,
            norm_num_groups=4,
            cross_attention_dim=48,
            sample_size=sample_size,
            caption_channels=parts.WIDTH,
            use_additional_conditions=sample_size == 128,
            num_attention_heads=2,
            attention_head_dim=24,  # three sizes share the width
        ),
    )


def _auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        scheduler=parts.flow(shift=1.73),
        vae=parts.vae(scaling_factor=0.13025),
        text_encoder=parts.umt5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=parts.WIDTH,
            caption_projection_dim=32,
            pos_embed_max_size=256,
            **_SQUARE,
        ),
    )


def _hidream() -> Any:
    return diffusers.HiDreamImagePipeline(
        scheduler=parts.flow(shift=3.0),
        vae=parts.shifted_vae(),
        text_encoder=parts.clip(True, 218),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip(True, 218),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(),
        tokenizer_3=parts.t5_tokenizer(),
        text_encoder_4=parts.llm("LlamaForCausalLM", "LlamaConfig", attn_implementation="eager"),
        tokenizer_4=tokenizer(),
        transformer=diffusers.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            caption_channels=[parts.WIDTH, 16],
            text_emb_dim=2 * parts.WIDTH,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(64, 64),
            llama_layers=[0, 2],
            **_SQUARE,
        ),
    )


def _ideogram4() -> Any:
    config = {"in_channels": 16, "num_layers": 1, "intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 208}
    denoisers = [diffusers.Ideogram4Transformer2DModel(**config, mrope_section=(4, 2, 2), **_SQUARE) for _ in range(2)]
    return diffusers.Ideogram4Pipeline(
        scheduler=parts.flow(),
        vae=parts.flux2_vae(),
        text_encoder=parts.qwen3_vl(layers=36),
        tokenizer=tokenizer(),
        transformer=denoisers[0],
        unconditional_transformer=denoisers[1],
    )


def _cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        scheduler=parts.dynamic(base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=parts.vae(),
        text_encoder=parts.llm("GlmModel", "GlmConfig"),
        tokenizer=tokenizer(1024, "<bos> $A"),
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            text_embed_dim=16,
            time_embed_dim=32,
            condition_dim=16,
            pos_embed_max_size=16,
            sample_size=8,
            rope_axes_dim=(8, 8),
            **_SQUARE,
        ),
    )


def _hunyuan_image(**config: Any) -> Any:
    return diffusers.HunyuanImagePipeline(
        scheduler=parts.flow(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=8,
            sample_size=64,
            scaling_factor=0.75289,
        ),
        text_encoder=parts.qwen25_vl(),
        tokenizer=tokenizer(2048),
        text_encoder_2=parts.t5(),
        tokenizer_2=parts.t5_tokenizer(),
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=parts.WIDTH,
            rope_axes_dim=(8, 8),
            **_SQUARE,
            **{"guidance_embeds": False} | config,
        ),
    )


def _wan(experts: int = 1, **config: Any) -> Any:
    needs("diffusers", "0.34", "Wan without ftfy")
    denoisers = [
        diffusers.WanTransformer3DModel(
            in_channels=4,
            out_channels=4,
            text_dim=parts.WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
            **_SQUARE,
        )
        for _ in range(experts)
    ]
    return diffusers.WanPipeline(
        scheduler=parts.flow(shift=3.0),
        vae=parts.frame_vae("AutoencoderKLWan"),
        text_encoder=parts.umt5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=denoisers[0],
        transformer_2=denoisers[1] if experts > 1 else None,
        **config,
    )


def _ltx() -> Any:
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.latents_mean.uniform_(-1, 1)
    vae.latents_std.uniform_(0.5, 2)
    return diffusers.LTXPipeline(
        scheduler=parts.dynamic(base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096),
        vae=vae,
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, cross_attention_dim=32, num_layers=1, caption_channels=parts.WIDTH, **_SQUARE
        ),
    )


_BUILDERS: dict[str, Callable[[], Any]] = {
    "sd": _sd,
    "sd2": lambda: _sd("v_prediction"),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "flux-schnell": _schnell,
    "flux-kontext": lambda: _flux("FluxKontextPipeline"),
    "flux-fill": lambda: _flux("FluxFillPipeline", in_channels=16 + 16 + 256, out_channels=16),
    "flux-control": lambda: _flux("FluxControlPipeline", in_channels=32, out_channels=16),
    "chroma": _chroma,
    "flux2": _flux2,
    "flux2-klein": _flux2_klein,
    "qwen-image": _qwen,
    "qwen-image-edit": lambda: _qwen("QwenImageEditPipeline", processor=TinyProcessor(14, 56 * 56)),
    "qwen-image-edit-plus": lambda: _qwen("QwenImageEditPlusPipeline", processor=TinyProcessor(14, 56 * 56)),
    "qwen-image-2.1": _qwen21,
    "z-image": _zimage,
    "krea2": _krea2,
    "lumina2": _lumina2,
    "sana": _sana,
    "pixart": lambda: _pixart("PixArtSigmaPipeline", 8),
    "pixart-alpha": lambda: _pixart("PixArtAlphaPipeline", 128),  # this size turns on what the model is told of sizes
    "auraflow": _auraflow,
    "hidream": _hidream,
    "ideogram4": _ideogram4,
    "cogview4": _cogview4,
    "hunyuan-image": _hunyuan_image,
    "hunyuan-image-distilled": lambda: _hunyuan_image(guidance_embeds=True, use_meanflow=True),
    "wan": _wan,
    "wan-2.2": lambda: _wan(2, boundary_ratio=0.9),
    "wan-2.2-5b": lambda: _wan(expand_timesteps=True),
    "ltx": _ltx,
}

TINY = tuple(_BUILDERS)
"""Names of the pipelines: those of the training families, and of variants of them."""


@cache
def shared(name: str) -> Any:
    """Return `tiny(name)`, one for all tests, which must leave it as it is."""
    return tiny(name)


def tiny(name: str) -> Any:
    """Return the pipeline `name`, in eval mode and frozen, always with the same weights, none of which are zero."""
    # Diffusers' own models use deprecated parts of it.
    with torch.random.fork_rng(devices=[]), ignored(FutureWarning):
        torch.manual_seed(0)
        pipe = _BUILDERS[name]()
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
                for path, parameter in part.named_parameters():
                    # A zero output layer would hide every mistake before it.
                    unset = "pad_token" in path or not parameter.isfinite().all()
                    if unset or (parameter.ndim and not parameter.any()):
                        nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe
