"""Tiny text encoders, autoencoders and schedulers of all kinds that pipelines have, with random weights.

Text encoders have as many layers as the pipelines read. Latents of autoencoders are an eighth of the pictures.
"""

from typing import Any

from torch import nn

from tests.support.tiny_tokenizers import IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VOCABULARY, tokenizer
from tests.support.versions import diffusers, transformers

_CLIP_LENGTH = 16
WIDTH = 32
_LLM: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 16,
}
_PICTURE_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
}


# Text encoders


def clip(projection: bool = False, length: int = _CLIP_LENGTH) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=length,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def clip_tokenizer() -> Any:
    return tokenizer(_CLIP_LENGTH, "<bos> $A <eos>", pad="<eos>")


def t5(width: int = WIDTH) -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def umt5() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes))


def t5_tokenizer() -> Any:
    return tokenizer(512, "$A <eos>")


def llm(model: str, config: str, layers: int = 3, **settings: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**_LLM, num_hidden_layers=layers, **settings))


def qwen25_vl() -> nn.Module:
    text = _LLM | {"num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = _VISION | {"fullatt_block_indexes": [0], "patch_size": 14}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_PICTURE_TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(model: str = "Qwen3VLModel", layers: int = 3) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    text = _LLM | {"num_hidden_layers": layers, "rope_parameters": rope}
    vision = _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 16}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_PICTURE_TOKENS)
    return getattr(transformers, model)(config)


def mistral3() -> nn.Module:
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = transformers.MistralConfig(**_LLM, num_hidden_layers=30, sliding_window=None)
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision)
    )


# Autoencoders


def vae(channels: int = 4, **settings: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=64,
        **settings,
    )


def shifted_vae() -> nn.Module:
    return vae(scaling_factor=0.3611, shift_factor=0.1159)


def flux2_vae() -> nn.Module:
    model = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2
    )
    model.bn.running_mean.uniform_(-1, 1)
    model.bn.running_var.uniform_(0.5, 2)
    return model


def frame_vae(name: str = "AutoencoderKLQwenImage") -> nn.Module:
    return getattr(diffusers, name)(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 1.1, 1.2, 1.3],
    )


# Schedulers


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def dynamic(**config: Any) -> Any:
    return flow(use_dynamic_shifting=True, **config)


def ddim(**config: Any) -> Any:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    # Otherwise the last step of a run stops at the first beta.
    return diffusers.DDIMScheduler(**betas, clip_sample=False, steps_offset=1, set_alpha_to_one=True, **config)
